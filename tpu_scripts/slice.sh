# shellcheck shell=bash
# Sourced by create_tpu.sh and launch.sh after env.sh: which slice, and how its workers are reached.
#
# A slice is asked for as a queued resource with one node of the same name. Everything that changes something goes
# through `run`, so that --dry-run prints it; questions go through `ask`, which a dry run prints and answers itself.

NAME=jmlr ZONE="" PROJECT="" TYPE="" RUNTIME="" BUCKET="" SPOT="" REST=()
POLL_SECONDS=${JMLR_POLL_SECONDS:-30}

# shellcheck disable=SC2016,SC2034  # printed by --help of the scripts that source this
SLICE_OPTIONS='  --name NAME      of the slice (default: jmlr)
  --zone ZONE      default: that of `gcloud config`; likewise --project
  --type TYPE      v5litepod-16 (or v5e-16), v4-32, v5p-16, v6e-16, ...: the slice is made if it is not there
  --runtime IMAGE  default: the one that belongs to the type
  --spot           cheaper; taken away at any time
  --bucket BUCKET  gs://NAME, mounted at /mnt/jmlr on every worker: the place for runs, models and data
  --dry-run        print every command instead of running it'

# Reads the options above into variables, and what it does not know into REST; the first other word ends them.
slice_options() {
    while (($#)); do
        case $1 in
            --name | --zone | --project | --type | --runtime | --bucket)
                (($# > 1)) || { say "$1 needs a value"; return 2; }
                case $1 in
                    --name) NAME=$2 ;;
                    --zone) ZONE=$2 ;;
                    --project) PROJECT=$2 ;;
                    --type) TYPE=${2/#v5e-/v5litepod-} ;;
                    --runtime) RUNTIME=$2 ;;
                    --bucket) BUCKET=$2 ;;
                esac
                shift 2
                ;;
            --spot) SPOT=1 && shift ;;
            --dry-run) JMLR_DRY_RUN=1 && shift ;;
            *) break ;;
        esac
    done
    REST=("$@")
    [[ -z $BUCKET || $BUCKET == gs://* ]] || { say "--bucket $BUCKET: expected gs://NAME"; return 2; }
}

# Prints a question and, unless this is a dry run, answers it; the answer of a dry run is the first argument.
ask() {
    local assumed=$1
    shift
    if [[ ${JMLR_DRY_RUN:-} == 1 ]]; then
        run "$@" >&2
        printf '%s\n' "$assumed"
    else
        "$@" 2>/dev/null
    fi
}

# gcloud, for this project and zone: tpu VERB... [FLAG]...
tpu() {
    printf '%s\n' gcloud compute tpus "$@" ${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"}
}

with_tpu() { # run | ask ANSWER, then the words of `tpu`
    local how=("$1") words
    if [[ $1 == ask ]]; then how+=("$2") && shift; fi
    shift
    mapfile -t words < <(tpu "$@")
    "${how[@]}" "${words[@]}"
}

# State of the slice: ACTIVE, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDED, FAILED, ... or NONE.
state() {
    with_tpu ask "$1" queued-resources describe "$NAME" '--format=value(state.state)' || echo NONE
}

runtime_of() {
    case $1 in
        v4-*) echo tpu-ubuntu2204-base ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) say "--type $1: unknown; give its image with --runtime" && return 2 ;;
    esac
}

# Makes the slice if it is not there, waits for it, and sets its workers up. A slice that was taken away is made anew.
ensure_slice() {
    local found before="" image
    found=$(state NONE)
    case $found in
        ACTIVE) say "$NAME is there" ;;
        SUSPENDED | SUSPENDING | FAILED)
            say "$NAME is $found: it was taken away or could not be made; asking again"
            with_tpu run queued-resources delete "$NAME" --force --quiet
            found=NONE
            ;;
    esac
    if [[ $found == NONE ]]; then
        [[ -n $TYPE ]] || { say "$NAME does not exist; give --type to make it"; return 2; }
        image=${RUNTIME:-$(runtime_of "$TYPE")} || return
        with_tpu run queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$TYPE" \
            "--runtime-version=$image" ${SPOT:+--spot} --scopes=https://www.googleapis.com/auth/cloud-platform
    fi
    until [[ $found == ACTIVE ]]; do
        [[ $found == "$before" ]] || say "$NAME: ${found,,}; waiting"
        before=$found
        [[ ${JMLR_DRY_RUN:-} == 1 ]] || sleep "$POLL_SECONDS"
        found=$(state ACTIVE)
        [[ $found != FAILED ]] || { say "$NAME could not be made; see: $(tpu queued-resources describe "$NAME" | paste -sd ' ')"; return 1; }
    done
    set_up_workers
}

# Runs one command line on worker 0, 1, ... or all.
on_worker() {
    local which=$1 line=$2
    shift 2
    with_tpu run tpu-vm ssh "$NAME" "--worker=$which" "--command=$line" "$@"
}

# Environment of everything that runs on a worker.
worker_env() {
    printf 'JMLR_TPU=1 JMLR_VENV=~/jmlr_venv'
    [[ -z $BUCKET ]] || printf ' JMLR_BUCKET=%q' "$BUCKET"
}

# Brings the code of the last commit to every worker and makes the environment there.
set_up_workers() {
    local archive
    archive=$(mktemp -d)/jmlr_jax.tar.gz
    if [[ -n $(git -C "$ROOT" status --porcelain 2>/dev/null) ]]; then
        say "there are changes that are not committed: they stay here, the workers get the last commit"
    fi
    run git -C "$ROOT" archive --format=tar.gz "--output=$archive" HEAD
    with_tpu run tpu-vm scp "$archive" "$NAME:jmlr_jax.tar.gz" --worker=all
    rm -rf "${archive%/*}"
    on_worker all "rm -rf jmlr_jax && mkdir jmlr_jax && tar -xzf jmlr_jax.tar.gz -C jmlr_jax"
    on_worker all "$(worker_env) bash jmlr_jax/tpu_scripts/run.sh print-config >/dev/null"
}
