"""How much work a step or a phase is at least.

The count is that of steps 1 to 6 of docs/method.md and nothing else: every matrix product once forward and once for
each gradient that training needs, causal attention over visible pairs only, no rematerialisation, no padding to blocks.
Two operations (a multiplication and an addition) for each pair of numbers multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

from jmlr_jax.config import Config
from jmlr_jax.config_models import BertConfig, LlamaConfig, RetrieverConfig
from jmlr_jax.run.phases import Phase


@dataclass(frozen=True)
class Work:
    """FLOPs of one question in a training step, by part."""

    encode: float
    judge: float
    read: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.encode + self.judge + self.read


def decoder_weights(cfg: LlamaConfig) -> int:
    """Numbers in the projections of all layers: the embedding, the head and the norms are not among them."""
    E = cfg.head_width
    attention = cfg.hidden_size * E * 2 * (cfg.num_heads + cfg.num_kv_heads)
    return cfg.num_layers * (attention + 3 * cfg.hidden_size * cfg.intermediate_size)


def visible_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key it sees, causally: ``length (length + 1) / 2`` without a window.

    >>> visible_pairs(4), visible_pairs(4, 2)
    (10, 7)
    """
    reach = min(length, window or length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def decoder_attention(cfg: LlamaConfig, length: int) -> float:
    """FLOPs of both attention products of all layers, forward, for one row."""
    pairs = sum(visible_pairs(length, window) for window in cfg.windows)
    return 4 * cfg.num_heads * cfg.head_width * pairs


def encoder_forward(cfg: BertConfig, dim: int, length: int) -> float:
    """FLOPs of one row of the encoder with its projection to token vectors."""
    D = cfg.hidden_size
    pairs = sum(near_pairs(length, window) for window in cfg.windows)
    return cfg.num_layers * 2 * encoder_weights(cfg) * length + 4 * D * pairs + 2 * D * dim * length


def encoder_weights(cfg: BertConfig) -> int:
    """Numbers in the projections of one layer."""
    D, sides = cfg.hidden_size, 3 if cfg.block == "modernbert" else 2  # a gated network has two ways in
    return 4 * D * D + sides * D * cfg.intermediate_size


def near_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key at most `window` away on either side: ``length ** 2`` without a window.

    >>> near_pairs(4), near_pairs(4, 1)
    (16, 10)
    """
    reach = min(length - 1, length if window is None else window)
    return length + 2 * sum(length - apart for apart in range(1, reach + 1))


def prompt_length(cfg: Config, passages: int) -> int:
    """Tokens of a prompt with so many passages, answer included, as the step lays it out."""
    g = cfg.generator
    return min(g.max_length, 1 + g.question_length + g.answer_length + passages * g.passage_length)


def step_work(cfg: Config, phase: Phase) -> Work:
    """FLOPs that the method needs for one question of a step of a phase, every row at its full length.

    Judging is a forward pass. Reading is a forward pass, the gradients of activations and, of what trains, those of
    weights: all of them in full fine-tuning, under adapters the adapters' own. The same holds for the retriever, whose
    projection to token vectors may train whole beside its adapters.

    Args:
      cfg: with the shapes and vocabulary sizes of the models that train.
    """
    llama, train = cfg.generator.llama, cfg.train
    passages = phase.passages_read(train.read_passages)
    judging = train.sampled * _decoder_forward(cfg, prompt_length(cfg, 1)) if phase.rank else 0.0
    reading = 0.0
    if phase.read:
        length = prompt_length(cfg, passages)
        forward, attention = _decoder_forward(cfg, length), decoder_attention(llama, length)
        lora = cfg.generator.lora
        if lora is None:
            reading = 3 * forward
        else:
            adapters = 3 * 2 * lora.rank * (sum(sum(_sides(llama, name)) for name in lora.targets if name != "lm_head"))
            reading = 2 * forward + attention + adapters * llama.num_layers * length
    return Work(_encoding(cfg) if phase.rank else 0.0, judging, reading)


def phase_work(cfg: Config, phase: Phase, steps: int, passages: int, questions: int) -> dict[str, float]:
    """FLOPs of a whole phase: ``encode judge read`` of its steps, and ``index``, the encoding of the corpus and of the
    questions for each table of candidates. The search in an index is not counted.

    Args:
      passages, questions: in the corpus, and those whose candidates are looked up for a table.
    """
    work, asked = step_work(cfg, phase), cfg.train.batch_size * steps
    tables = {"live": 1 + ((steps - 1) // cfg.train.refresh_steps if cfg.train.refresh_steps else 0), "retriever": 1}
    bert, retriever = cfg.retriever.bert, cfg.retriever
    once = passages * encoder_forward(bert, retriever.dim, retriever.passage_length)
    once += questions * encoder_forward(bert, retriever.dim, retriever.query_length)
    parts = {"encode": work.encode * asked, "judge": work.judge * asked, "read": work.read * asked}
    return {**parts, "index": tables.get(phase.passages, 0) * once}


def _decoder_forward(cfg: Config, length: int) -> float:
    """FLOPs of one prompt through the decoder, its head at the answer's places alone."""
    llama = cfg.generator.llama
    head = 2 * llama.hidden_size * llama.vocab_size * cfg.generator.answer_length
    return 2 * decoder_weights(llama) * length + head + decoder_attention(llama, length)


def _encoding(cfg: Config) -> float:
    """FLOPs of training the retriever on a question and its candidates."""
    retriever, K = cfg.retriever, cfg.train.candidates
    forward = K * encoder_forward(retriever.bert, retriever.dim, retriever.passage_length)
    forward += encoder_forward(retriever.bert, retriever.dim, retriever.query_length)
    forward += 2 * K * retriever.query_length * retriever.passage_length * retriever.dim
    return 3 * forward - _spared(retriever, K)


def _spared(cfg: RetrieverConfig, passages: int) -> float:
    """FLOPs that adapters save in training the retriever on a question and its candidates: gradients of frozen weights
    less the adapters' own products."""
    if cfg.lora is None:
        return 0
    D, F, tokens = cfg.bert.hidden_size, cfg.bert.intermediate_size, passages * cfg.passage_length + cfg.query_length
    sides = {"qkv": (D, 3 * D), "up": (D, F if cfg.bert.block == "bert" else 2 * F), "down": (F, D)}
    adapters = 3 * 2 * cfg.lora.rank * sum(sum(sides.get(name, (D, D))) for name in cfg.lora.targets)
    frozen = cfg.bert.num_layers * (2 * encoder_weights(cfg.bert) - adapters)
    return tokens * (frozen + (0 if "projection" in cfg.lora.whole else 2 * D * cfg.dim))


def _sides(cfg: LlamaConfig, name: str) -> tuple[int, int]:
    """Width of what a projection reads and of what it makes."""
    E = cfg.head_width
    D, F, q, kv = cfg.hidden_size, cfg.intermediate_size, cfg.num_heads * E, cfg.num_kv_heads * E
    return {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D), "gate": (D, F), "up": (D, F), "down": (F, D)}[name]
