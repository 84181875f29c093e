#!/usr/bin/env bash
# Sets up the environment, then runs jmlr. The same command serves a laptop and every worker of a TPU slice.
set -euo pipefail
# shellcheck source=tpu_scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage() {
    cat <<'TEXT'
usage: bash tpu_scripts/run.sh [OPTION | key=value]...   set up, then: jmlr run ...
       bash tpu_scripts/run.sh COMMAND [ARGUMENT]...     set up, then: jmlr COMMAND ...

  bash tpu_scripts/run.sh                        the whole method on the embedded closed world
  bash tpu_scripts/run.sh --config smoke         the same path in miniature
  bash tpu_scripts/run.sh train train.steps=50   one command; `run.sh run --help` and the like explain each

TEXT
    sed -n 's/^# Environment: /Environment:\n  /p; s/^# \{14\}/  /p' "$ROOT/tpu_scripts/env.sh"
}

install_package() {
    install --editable "$ROOT${extra:+[$extra]}"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi
extra=""
if on_tpu; then extra=tpu; fi
ensure_env "run${extra:+-$extra}" install_package
if (($# == 0)) || [[ $1 == -* || $1 == *=* ]]; then
    set -- run "$@"
fi
run exec "$VENV/bin/jmlr" "$@"
