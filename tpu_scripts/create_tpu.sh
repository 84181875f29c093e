#!/usr/bin/env bash
# Asks for a TPU slice, waits until it is there, and sets up every worker. Run again, it does what is missing.
set -euo pipefail
# shellcheck source=tpu_scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=tpu_scripts/slice.sh
. "$ROOT/tpu_scripts/slice.sh"

usage() {
    cat <<TEXT
usage: bash tpu_scripts/create_tpu.sh --type TYPE [OPTION]...

Makes a slice, or makes it again if it was taken away, and installs the last commit on every worker.
Needs gcloud, logged in, with a project whose TPU quota covers the slice.

$SLICE_OPTIONS
  --delete         give the slice back instead

  bash tpu_scripts/create_tpu.sh --type v5litepod-16 --zone us-west4-a --spot --bucket gs://my-bucket
TEXT
}

slice_options "$@"
case ${REST[*]} in
    "") ensure_slice ;;
    --delete) with_tpu run queued-resources delete "$NAME" --force --quiet ;;
    -h | --help) usage ;;
    *) say "unknown: ${REST[*]} (see --help)" && exit 2 ;;
esac
