"""Flags of the TPU compiler: the same for a run on a slice and for its plan."""

from __future__ import annotations

import os

FLAGS = {
    # On-chip memory, in KiB, that one operation may take: products in larger tiles read their operands less often.
    "xla_tpu_scoped_vmem_limit_kib": "65536",
    # MiB from which a product that meets a gather or a scatter of its operand is cut into a ring of partial products,
    # each of which reads and writes all the sums; never, so that gathers and scatters run beside other work.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}  # what each is worth: docs/benchmarks.md, "Plans"


def set_flags() -> None:
    """Adds to ``LIBTPU_INIT_ARGS`` each flag that it does not name; libtpu reads it once, when it is loaded."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    new = [f"--{name}={value}" for name, value in FLAGS.items() if name not in given]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([given, *new]).strip()
