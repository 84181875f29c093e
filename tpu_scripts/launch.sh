#!/usr/bin/env bash
# Runs one jmlr command on every worker of a slice and follows it to its end, across pre-emptions.
set -euo pipefail
# shellcheck source=tpu_scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=tpu_scripts/slice.sh
. "$ROOT/tpu_scripts/slice.sh"

SETTLE_SECONDS=${JMLR_SETTLE_SECONDS:-120} # until a slice that is being taken away says so

usage() {
    cat <<TEXT
usage: bash tpu_scripts/launch.sh [OPTION]... COMMAND [ARGUMENT]...   jmlr COMMAND ... on every worker
       bash tpu_scripts/launch.sh [OPTION]... --attach                follow what runs there already
       bash tpu_scripts/launch.sh [OPTION]... --logs FOLDER           fetch the output of every worker
       bash tpu_scripts/launch.sh [OPTION]... --profile               trace the next steps, into RUN/arms/PHASE/profile
       bash tpu_scripts/launch.sh [OPTION]... --stop                  save a checkpoint and stop

The command goes on when this script or its connection ends. A slice that is taken away is asked for again, and the
command goes on from its last checkpoint, which is why a run directory must outlive the slice: put it under /mnt/jmlr.

$SLICE_OPTIONS

  bash tpu_scripts/launch.sh --type v5litepod-16 --spot --bucket gs://my-bucket \\
      run --config paper_7b --run-dir /mnt/jmlr/runs/paper_7b
TEXT
}

# Starts the command on every worker, in a session of its own that outlives the connection.
start() {
    local words line
    printf -v words ' %q' "$@" --distributed auto
    # shellcheck disable=SC2016  # the variables are the worker's
    line='setsid nohup bash -c '\''echo $$ >jmlr.pid; '"$(worker_env)"' bash jmlr_jax/tpu_scripts/run.sh "$@"; '
    line+='echo "jmlr: exit status $?"'\'' jmlr'"$words"' >jmlr.log 2>&1 </dev/null & sleep 1'
    on_worker all "$line"
}

# Shows the output of worker 0 until the command ends or the connection breaks; prints the status, if there is one.
follow() {
    local seen tail
    # shellcheck disable=SC2016  # the variable is the worker's
    tail='tail -n +1 -f --pid="$(cat jmlr.pid)" jmlr.log'
    if [[ ${JMLR_DRY_RUN:-} == 1 ]]; then
        on_worker 0 "$tail" >&2
        echo 0
        return
    fi
    seen=$(mktemp)
    on_worker 0 "$tail" 2>&1 | tee "$seen" >&2 || true
    sed -n 's/^jmlr: exit status //p' "$seen" | tail -n 1
    rm -f "$seen"
}

# Follows, and starts again on a new slice, until the command has ended by itself.
see_through() {
    local status found
    while true; do
        status=$(follow)
        [[ $status != 0 ]] || return 0
        [[ -z $status ]] || sleep "$SETTLE_SECONDS"
        found=$(state ACTIVE)
        if [[ $found == ACTIVE && -n $status ]]; then
            say "the command ended with status $status; the output of every worker: launch.sh --logs FOLDER"
            return "$status"
        elif [[ $found == ACTIVE ]]; then
            say "the connection broke; following again"
            sleep "$POLL_SECONDS"
        elif [[ $# == 0 || -z $TYPE ]]; then
            say "the slice is gone ($found); give --type and the command to go on with a new one"
            return 1
        else
            say "the slice is gone ($found)"
            ensure_slice
            start "$@"
        fi
    done
}

slice_options "$@"
set -- "${REST[@]}"
case ${1:-} in
    "") usage >&2 && exit 2 ;;
    -h | --help) usage ;;
    --attach) see_through ;;
    --logs)
        (($# == 2)) || { say "--logs needs a folder" && exit 2; }
        run mkdir -p "$2"
        on_worker all 'cat jmlr.log' "--output-directory=$2"
        ;;
    --profile) on_worker all 'pkill -USR1 -x jmlr' ;;
    --stop) on_worker all 'pkill -TERM -x jmlr' ;;
    -*) say "unknown: $1 (see --help)" && exit 2 ;;
    *)
        ensure_slice
        start "$@"
        see_through "$@"
        ;;
esac
