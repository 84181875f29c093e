"""How much work a step is at least, and what a chip can do: the yardsticks that a plan measures a program by.

The count is that of steps 1 to 6 of docs/method.md and nothing else: every matrix product once forward and once for
each gradient that training needs, causal attention over visible pairs only, no rematerialisation, no padding to blocks.
Two operations (a multiplication and an addition) for each pair of numbers multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

from jmlr_jax.config import Config
from jmlr_jax.config_models import BertConfig, LlamaConfig, RetrieverConfig


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      peak: bfloat16 FLOP/s.
      clock: Hz of the cycles that the compiler estimates.
      hbm: bytes of memory that a program can use; the rest belongs to the system.
      bandwidth: bytes/s of memory.
      link, links: bytes/s of one link in one direction; how many links even a corner of a slice has.
      fill: share of the matrix unit that heads of width 128 fill; it is 256 wide on v6e.
      price: US dollars for a chip-hour on demand: an assumption, to be replaced by your own.
      megacore: whether the chip's two cores are one device of the program.
    """

    name: str
    peak: float
    clock: float
    hbm: float
    bandwidth: float
    link: float
    links: int
    fill: float
    price: float
    megacore: bool = False


GIB = 2**30
# Peaks, bandwidths and links as published for each generation; usable memory as the compiler states it.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 1.05e9, 30.75 * GIB, 1.23e12, 45e9, 3, 1.0, 3.22, megacore=True),
    "v5e": Chip("TPU v5e", 197e12, 1.5e9, 15.75 * GIB, 0.82e12, 45e9, 2, 1.0, 1.20),
    "v5p": Chip("TPU v5p", 459e12, 1.75e9, 95.74 * GIB, 2.77e12, 90e9, 3, 1.0, 4.20),
    "v6e": Chip("TPU v6e", 918e12, 1.75e9, 31.25 * GIB, 1.64e12, 90e9, 2, 0.5, 2.70),
}


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
    E = cfg.head_dim or cfg.hidden_size // cfg.num_heads
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
    E = cfg.head_dim or cfg.hidden_size // cfg.num_heads
    return 4 * cfg.num_layers * cfg.num_heads * E * visible_pairs(length, cfg.sliding_window)


def encoder_forward(cfg: BertConfig, dim: int, length: int) -> float:
    """FLOPs of one row of the encoder with its projection to token vectors."""
    D = cfg.hidden_size
    layer = 2 * (4 * D * D + 2 * D * cfg.intermediate_size) * length + 4 * D * length**2
    return cfg.num_layers * layer + 2 * D * dim * length


def prompt_lengths(cfg: Config) -> tuple[int, int]:
    """Tokens of a judging and of a reading prompt, answers included, as the step lays them out."""
    g = cfg.generator
    around = 1 + g.question_length + g.answer_length
    return (
        min(g.max_length, around + g.passage_length),
        min(g.max_length, around + cfg.train.read_passages * g.passage_length),
    )


def step_work(cfg: Config) -> Work:
    """FLOPs that the method needs for one question of a joint step, every row at its full length.

    Judging is a forward pass. Reading is a forward pass, the gradients of activations and, of what trains, those of
    weights: all of them in full fine-tuning, under adapters the adapters' own. The same holds for the retriever, whose
    projection to token vectors may train whole beside its adapters.
    """
    llama, retriever, train = cfg.generator.llama, cfg.retriever, cfg.train
    weights, A = decoder_weights(llama), cfg.generator.answer_length
    head = 2 * llama.hidden_size * llama.vocab_size * A
    judged, read = prompt_lengths(cfg)
    forward = 2 * weights * read + head
    attention = decoder_attention(llama, read)
    lora = cfg.generator.lora
    if lora is None:
        reading = 3 * (forward + attention)
    else:
        adapters = 3 * 2 * lora.rank * (sum(sum(_sides(llama, name)) for name in lora.targets if name != "lm_head"))
        reading = 2 * forward + 3 * attention + adapters * llama.num_layers * read
    encoding = train.candidates * encoder_forward(retriever.bert, retriever.dim, retriever.passage_length)
    encoding += encoder_forward(retriever.bert, retriever.dim, retriever.query_length)
    encoding += 2 * train.candidates * retriever.query_length * retriever.passage_length * retriever.dim
    judging = train.sampled * (2 * weights * judged + head + decoder_attention(llama, judged))
    return Work(3 * encoding - _spared(retriever, train.candidates), judging, reading)


def _spared(cfg: RetrieverConfig, passages: int) -> float:
    """FLOPs that adapters save in training the retriever on a question and its candidates: gradients of frozen weights
    less the adapters' own products."""
    if cfg.lora is None:
        return 0
    D, F, tokens = cfg.bert.hidden_size, cfg.bert.intermediate_size, passages * cfg.passage_length + cfg.query_length
    sides = {"up": (D, F), "down": (F, D)}
    adapters = 3 * 2 * cfg.lora.rank * sum(sum(sides.get(name, (D, D))) for name in cfg.lora.targets)
    frozen = cfg.bert.num_layers * (2 * (4 * D * D + 2 * D * F) - adapters)
    return tokens * (frozen + (0 if "projection" in cfg.lora.whole else 2 * D * cfg.dim))


def _sides(cfg: LlamaConfig, name: str) -> tuple[int, int]:
    """Width of what a projection reads and of what it makes."""
    E = cfg.head_dim or cfg.hidden_size // cfg.num_heads
    D, F, q, kv = cfg.hidden_size, cfg.intermediate_size, cfg.num_heads * E, cfg.num_kv_heads * E
    return {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D), "gate": (D, F), "up": (D, F), "down": (F, D)}[name]
