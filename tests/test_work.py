"""The least work of steps and phases, counted by hand."""

from __future__ import annotations

import pytest

from jmlr_jax.config import Config
from jmlr_jax.config_models import EncoderLoraConfig
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.work import Work, encoder_forward, phase_work, prompt_length, step_work

JMLR = PHASES["jmlr"]
SMALL = {
    "retriever": {
        "dim": 128,
        "query_length": 32,
        "passage_length": 64,
        "bert": {"vocab_size": 512, "hidden_size": 128, "max_positions": 64},
    },
    "generator": {
        "llama": {
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_heads": 2,
            "num_kv_heads": 2,
        },
        "lora": {"rank": 8},
        "passage_length": 112,
        "question_length": 127,
        "answer_length": 16,
        "max_length": 512,
    },
    "train": {
        "batch_size": 8,
        "candidates": 6,
        "mix": {"index": 6, "bm25": 0, "random": 0},
        "sampled": 4,
        "read_passages": 3,
        "refresh_steps": 10,
    },
}


@pytest.fixture
def cfg() -> Config:
    return Config.model_validate(SMALL)


def test_least_work_by_hand(cfg: Config) -> None:
    """One layer, one head, written out with numbers; then what adapters save."""
    work = step_work(cfg, JMLR)
    D, F, V, A, r = 256, 512, 512, 16, 8
    weights = 2 * (4 * D * D + 3 * D * F)  # two layers
    judged, read = 1 + 112 + 127 + 16, 1 + 3 * 112 + 127 + 16
    assert (prompt_length(cfg, 1), prompt_length(cfg, 3)) == (judged, read)
    head = 2 * D * V * A

    def attention(tokens: int) -> float:
        return 2 * 2 * 2 * D * tokens * (tokens + 1) / 2  # layers, products, FLOPs, width, pairs

    assert work.judge == 4 * (2 * weights * judged + head + attention(judged))
    adapters = 2 * 3 * 2 * r * (4 * (D + D) + 3 * (D + F)) * read
    assert work.read == 2 * (2 * weights * read + head) + 3 * attention(read) + adapters
    full = cfg.model_copy(update={"generator": cfg.generator.model_copy(update={"lora": None})})
    assert step_work(full, JMLR).read == 3 * (2 * weights * read + head + attention(read))
    adapted = cfg.retriever.model_copy(update={"lora": EncoderLoraConfig(rank=8, targets=("q", "up"))})
    tokens, saved = 6 * 64 + 32, 2 * (4 * 128 * 128 + 2 * 128 * 128) - 3 * 2 * 8 * 2 * (128 + 128)
    assert work.encode - step_work(cfg.model_copy(update={"retriever": adapted}), JMLR).encode == tokens * saved
    one = 1 * (2 * (4 * 128 * 128 + 2 * 128 * 128) * 64 + 4 * 128 * 64**2) + 2 * 128 * 128 * 64
    assert encoder_forward(cfg.retriever.bert, 128, 64) == one


def test_a_phase_does_what_it_is_for(cfg: Config) -> None:
    joint = step_work(cfg, JMLR)
    assert step_work(cfg, PHASES["separate_retriever"]) == Work(joint.encode, joint.judge, 0)
    for name in ("separate", "frozen", "bm25", "random"):
        assert step_work(cfg, PHASES[name]) == Work(0, 0, joint.read)
    closed, warmup = (step_work(cfg, PHASES[name]).read for name in ("closed_book", "warmup"))
    assert 0 < closed < warmup < joint.read  # no passage, one, three
    assert step_work(cfg, PHASES["warmup"]).total == warmup


def test_work_of_a_whole_phase(cfg: Config) -> None:
    joint = step_work(cfg, JMLR)
    found = phase_work(cfg, JMLR, steps=21, passages=1000, questions=50)
    questions = 21 * 8
    assert found["encode"] == questions * joint.encode and found["read"] == questions * joint.read
    bert = cfg.retriever.bert
    once = 1000 * encoder_forward(bert, 128, 64) + 50 * encoder_forward(bert, 128, 32)
    assert found["index"] == 3 * once  # before the first step, and beside steps 10 and 20
    assert phase_work(cfg, JMLR, 20, 1000, 50)["index"] == 2 * once
    assert phase_work(cfg, PHASES["frozen"], 21, 1000, 50)["index"] == once
    assert phase_work(cfg, PHASES["bm25"], 21, 1000, 50)["index"] == 0
    never = cfg.model_copy(update={"train": cfg.train.model_copy(update={"refresh_steps": 0})})
    assert phase_work(never, JMLR, 21, 1000, 50)["index"] == once
