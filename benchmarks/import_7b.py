"""Throughput and peak host memory of reading a sharded checkpoint of Llama-2-7B's shape.

    python benchmarks/import_7b.py /tmp/synthetic --remove      13.5 GB of disk, about 18 GB of memory on a CPU
    python benchmarks/import_7b.py /tmp/synthetic --layers 2    the same tensors, fewer layers
    python benchmarks/import_7b.py /tmp/synthetic --devices 8   weights sharded over eight virtual devices

Random bfloat16 weights are written shard by shard (kept for the next run, unless --remove), then read by a fresh
process. On a CPU the devices' memory is the host's, so the weights themselves are part of the peak; what counts is the
peak beyond them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from jmlr_jax.config import MeshConfig
from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.hf.config import llama_to_hf
from jmlr_jax.hf.io import Tensor, whole_directory, write_directory, write_json
from jmlr_jax.hf.llama import llama_rows
from jmlr_jax.hf.table import expected, leaves

SHARD_BYTES = 5_000_000_000
SPARE_BYTES = 1_000_000_000


def shape(layers: int, scale: int) -> LlamaConfig:
    """Llama-2-7B with so many layers, every width divided by `scale`."""
    return LlamaConfig(
        vocab_size=32000 // scale,
        hidden_size=4096 // scale,
        intermediate_size=11008 // scale,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=32,
        max_positions=4096,
        rms_norm_eps=1e-5,
        tie_embeddings=False,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )


def write(folder: Path, cfg: LlamaConfig, shard_bytes: int) -> None:
    """Random weights as Hugging Face stores them, in several files: finite bit patterns, cheap to draw."""
    from jmlr_jax.nn.functional import abstract_params

    bfloat16 = leaves(abstract_params(cfg))["embed"].dtype

    def draw(number: int, shape: tuple[int, ...]) -> np.ndarray:
        bits = np.random.default_rng(number).integers(0, 1 << 16, shape, np.uint16)
        return (bits & np.uint16(0xBFFF)).view(bfloat16)  # top exponent bit cleared: below 2, finite

    keys = expected(llama_rows(cfg), leaves(abstract_params(cfg)))
    tensors = [
        Tensor(key, np.dtype(bfloat16), theirs, partial(draw, number, theirs))
        for number, (key, (_, _, theirs)) in enumerate(keys.items())
    ]
    needed, free = sum(tensor.size for tensor in tensors), shutil.disk_usage(folder.parent).free
    if free < needed + SPARE_BYTES:
        sys.exit(f"{folder.parent}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB and 1 GB to spare are needed")
    with whole_directory(folder) as part:
        write_json(part / "config.json", llama_to_hf(cfg))
        write_directory(part, tensors, shard_bytes)


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status, e.g. VmHWM, the peak of resident memory since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def read(folder: Path, cfg: LlamaConfig) -> dict[str, float]:
    """Reads the checkpoint in this process and measures it."""
    import jax

    from jmlr_jax.hf.load import load_generator
    from jmlr_jax.parallel.sharding import make_mesh

    mesh = make_mesh(MeshConfig(data=1, fsdp=-1)) if jax.device_count() > 1 else None
    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # the backend is up
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.perf_counter()
    _, params = load_generator(str(folder), cfg, mesh)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - started
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    gigabyte = 1e9
    return {
        "devices": jax.device_count(),
        "files": len(list(folder.glob("*.safetensors"))),
        "weights_gb": weights / gigabyte,
        "seconds": seconds,
        "gb_per_second": weights / gigabyte / seconds,
        "peak_beyond_weights_gb": (memory("VmHWM") - before - weights) / gigabyte,
        "largest_tensor_gb": max(cfg.vocab_size, cfg.intermediate_size) * cfg.hidden_size * 2 / gigabyte,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--scale", type=int, default=1, help="divides every width")
    parser.add_argument("--devices", type=int, default=1, help="virtual devices that the weights are sharded over")
    parser.add_argument("--remove", action="store_true", help="remove the checkpoint afterwards, also after a failure")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cfg = shape(args.layers, args.scale)
    folder = args.folder / f"layers_{args.layers}_scale_{args.scale}"
    if args.read:
        print(json.dumps(read(folder, cfg)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        if not folder.exists():
            started = time.perf_counter()
            write(folder, cfg, SHARD_BYTES // args.scale**2)  # as many files as at full size
            print(f"written in {time.perf_counter() - started:.0f} s", flush=True)
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
        done = subprocess.run(
            [sys.executable, *sys.argv, "--read"],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            sys.exit(f"reading failed with status {done.returncode}; -9 is what running out of memory looks like")
        for name, value in json.loads(done.stdout).items():
            print(f"{name:24} {value:8.2f}")
    finally:
        if args.remove:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
