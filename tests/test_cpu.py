"""What is told of a CPU before a run spends hours on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jmlr_jax.config import Config
from jmlr_jax.run.cpu import cpu_flags, slow_dtype, tell

LLAMA = "generator.llama.dtype=float32 generator.llama.param_dtype=float32"
BERT = "retriever.bert.dtype=float32"


@pytest.mark.parametrize(
    ("flags", "dtypes", "said"),
    [
        ("avx2 fma", ("bfloat16", "bfloat16"), f"{LLAMA} {BERT}"),
        ("avx2 fma", ("float32", "bfloat16"), BERT),
        ("avx2 fma", ("float32", "float32"), None),
        ("avx512f amx_bf16", ("bfloat16", "bfloat16"), None),
        ("avx512_bf16", ("bfloat16", "bfloat16"), None),
        ("", ("bfloat16", "bfloat16"), None),
    ],
)
def test_bfloat16_is_told_where_the_cpu_has_no_instructions_for_it(
    flags: str, dtypes: tuple[str, str], said: str | None
) -> None:
    llama = {"dtype": dtypes[0], "param_dtype": dtypes[0]}
    given = {"generator": {"llama": llama, "lora": {}}, "retriever": {"bert": {"dtype": dtypes[1]}}}
    found = slow_dtype(Config.model_validate(given), frozenset(flags.split()))
    assert found is None if said is None else found is not None and found.endswith(f"in a new run: {said}")


def test_it_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        tell("slow here")
    assert capsys.readouterr().err.count("slow here") == 1


def test_flags_are_those_of_the_first_cpu(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nvendor_id\t: X\nflags\t\t: fpu avx2\nflags\t\t: fpu\n")
    assert cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx2"}
    assert cpu_flags(tmp_path / "none") == frozenset()
