"""The configuration schema: frozen, typed, and the only place where a default lives.

Nothing here imports JAX, so that ``jmlr --help`` and ``jmlr print-config`` answer at once.
Checks that need no device are validators of these classes (phase one); checks that need to know
the devices are in :func:`jmlr_jax.parallel.sharding.make_mesh` (phase two).

Sections of the models are in ``config_models.py``. The defaults describe the embedded closed world
(``jmlr_jax.data.world``) and the tiny models that learn to read it on a laptop; presets in ``configs/`` hold only what
differs.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from jmlr_jax.config_models import GeneratorConfig, LocalPath, ReadPath, RetrieverConfig, Strict, UnitInterval

RankLossName = Literal["llm_rank", "kl", "emdr2"]
ArmName = Literal["jmlr", "frozen", "separate", "bm25", "random", "closed_book"]
SuiteName = Literal[
    "mirage",
    "medqa",
    "medxpertqa",
    "mmlu_pro",
    "pubmedqa",
    "pubmedqa_abstract",
    "bioasq",
    "bioasq_snippets",
    "amboss",
]


class WorldConfig(Strict):
    """Size of the embedded closed medical world (``jmlr_jax.data.world``)."""

    conditions: PositiveInt = 560
    test_fraction: float = Field(
        0.25, gt=0, lt=1, description="fraction of conditions held out (a quarter of them for dev)"
    )
    values: PositiveInt = Field(150, ge=8, description="length of each relation's closed list of answers")
    hint_probability: float = Field(
        0.6, ge=0, le=1, description="that a passage also has the lay word of a part, for each part"
    )
    trap_probability: float = Field(
        0.2, ge=0, le=1, description="that a fact has a passage in lay words that does not state it"
    )


class DataConfig(Strict):
    """Where questions and passages come from."""

    questions: Literal[
        "world",
        "medqa",
        "medmcqa",
        "mmlu",
        "pubmedqa",
        "mirage",
        "medxpertqa",
        "mmlu_pro",
        "bioasq",
        "jsonl",
        "csv",
        "tsv",
    ] = Field("world", description="the embedded world, a published format, or plain records; docs/suites.md")
    train_path: ReadPath | None = None
    dev_path: ReadPath | None = None
    test_path: ReadPath | None = None
    corpus_path: ReadPath | None = Field(
        None,
        description="passages: JSONL, CSV or TSV with id, title, text[, source, url]; null: those of the world, or "
        "what PubMedQA and BioASQ give to each question",
    )
    world: WorldConfig = WorldConfig()
    on_error: Literal["stop", "skip"] = Field("stop", description="skip: bad records are counted and listed")
    tsv_quotes: bool = Field(
        False, description="cells of TSV files may stand in double quotes, over several lines; else quotes are text"
    )
    passage_words: PositiveInt = Field(
        180, description="longer documents are split on sentence ends at this many words"
    )
    leakage_ngram: int = Field(
        12, ge=0, description="a passage sharing this many words in a row with question + answer is removed; 0: off"
    )


class IndexConfig(Strict):
    """Candidate retrieval."""

    kind: Literal["auto", "exact", "scann"] = Field("auto", description="auto: exact below `exact_below` passages")
    exact_below: int = Field(20_000, ge=0)
    encode_batch: PositiveInt = 128
    rerank: PositiveInt = Field(6000, description="ScaNN hits that MaxSim scores, at most; see `ann_recall`")
    ann_recall: float | None = Field(
        0.95,
        gt=0,
        le=1,
        description="fraction of the exact best that must be found, by the least work; null: score `rerank` hits",
    )
    bits: float = Field(
        4.0, gt=0, le=16, description="of stored token vectors, per dimension; 16: float16, no code; else at most 8"
    )
    fde_partitions: PositiveInt = Field(
        256, description="clusters of passage tokens; an encoding holds a passage's best token for each"
    )
    pca_components: PositiveInt = Field(
        256, description="principal components of the encodings, learned from a sample, that ScaNN searches"
    )
    oracle_queries: PositiveInt = Field(
        200, description="queries on which ANN recall, against the exact oracle, is measured"
    )

    @model_validator(mode="after")
    def _check(self) -> IndexConfig:
        if 8 < self.bits < 16:
            raise ValueError(f"bits={self.bits}: a code has at most 8 bits a dimension; 16 stores float16")
        return self


class OptimizerConfig(Strict):
    """AdamW with warm-up and cosine decay for one half of the model."""

    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(20, ge=0)
    final_fraction: float = Field(0.1, ge=0, le=1, description="learning rate at the last step over the peak")
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="global gradient norm of this half")
    b1: float = 0.9
    b2: float = 0.999


class WarmupConfig(Strict):
    """Steps that teach a generator trained from scratch to read, before any arm starts; every arm gets the same.

    One passage is read at a time, the rank loss is off. With `distant_probability` it is one that BM25 finds for
    question and right answer together (distant supervision: the answer is a training label, the gold passage is not
    used); else one that BM25 finds for the question alone, or a random one: not everything read is to be trusted. With
    `rename` words that occur in answers are exchanged at random in each example, alike in passage, options and answer:
    no fact can be memorised and reading is the only way to a lower loss. 0 steps for a pre-trained generator.
    """

    steps: int = Field(1500, ge=0)
    distant_probability: tuple[UnitInterval, UnitInterval] = Field(
        (0.8, 0.1), description="at the first step and, linearly, at the last"
    )
    distant_depth: PositiveInt = Field(3, description="how many of the distant passages are in play")
    rename: UnitInterval = Field(
        1.0, description="exchange answer tokens that at most this fraction of passages holds; 0: none, 1: all"
    )
    learning_rate: float = Field(3e-3, gt=0)


class MixConfig(Strict):
    """Where the K training candidates come from; the three add up to train.candidates.

    The paper takes all K from the retriever. Passages that the retriever does not find keep it honest about the rest
    of the corpus, and lexical ones keep the right passage in reach of a retriever that starts from scratch.
    """

    index: PositiveInt = 6
    bm25: int = Field(5, ge=0)
    random: int = Field(5, ge=0)


class TrainConfig(Strict):
    """The joint step and the loop around it (method.md, One training step)."""

    steps: PositiveInt = 300
    batch_size: PositiveInt = Field(32, description="B: questions a step, over all devices")
    accumulate: PositiveInt = Field(1, description="microbatches a step; must divide batch_size")
    candidates: PositiveInt = Field(16, description="K (30 in the paper)")
    mix: MixConfig = MixConfig()
    sampled: PositiveInt = Field(8, description="M (10 in the paper)")
    pack: tuple[UnitInterval, ...] = Field(
        (0.6, 0.8),
        description="judging and reading compute for the least of these fractions of their prompts at full length that "
        "holds the tokens; each is compiled, and changes rounding alone",
    )
    read_passages: PositiveInt = Field(3, description="N (7 in the paper)")
    rank_loss: RankLossName = "llm_rank"
    rank_weight: float = Field(1.0, ge=0)
    judge_decay: UnitInterval = Field(
        0.0,
        description="passages are judged by an exponential average of the generator that forgets 1 - this a step; 0: "
        "by the generator itself, as in the paper; 1: by the generator as the phase began",
    )
    judge_int8: bool = Field(
        False,
        description="judging multiplies in int8: weights are rounded by output channel, activations by token",
    )
    probe_questions: int = Field(
        32, ge=0, description="dev questions with gold passages that the judge is tried on; 0: none"
    )
    probe_steps: PositiveInt = Field(25, description="steps between these trials")
    help_margin: float = Field(
        0.8,
        ge=0,
        description="a pair of judged passages counts where the better one lowers the answer loss by more than this, "
        "nats per token, below the median of the question's judged passages; 0: every pair counts, as in the paper",
    )
    refresh_steps: int = Field(
        50, ge=0, description="R: steps between refreshes of the candidate table; 0: never, as in the paper"
    )
    refresh_delay: PositiveInt = Field(5, description="steps from the start of a refresh to its adoption")
    warmup: WarmupConfig = WarmupConfig()
    retriever: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
    generator: OptimizerConfig = OptimizerConfig(learning_rate=3e-4)
    importance: OptimizerConfig = Field(
        OptimizerConfig(learning_rate=0.03), description="of retriever.importance, a direction among unit vectors"
    )
    checkpoint_steps: PositiveInt = 100
    keep_last: PositiveInt = 2
    dev_questions: int = Field(128, ge=0, description="dev questions read at each checkpoint to find the best; 0: none")
    max_skipped_in_row: PositiveInt = Field(10, description="non-finite updates in a row that stop the run")
    log_steps: PositiveInt = 10

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}")
        for name in ("sampled", "read_passages"):
            if getattr(self, name) > self.candidates:
                raise ValueError(f"{name}={getattr(self, name)} exceeds candidates={self.candidates}")
        mixed = self.mix.index + self.mix.bm25 + self.mix.random
        if mixed != self.candidates:
            raise ValueError(f"mix.index + mix.bm25 + mix.random = {mixed}: not candidates={self.candidates}")
        if self.refresh_steps and self.refresh_delay >= self.refresh_steps:
            raise ValueError(f"refresh_delay={self.refresh_delay} must be below refresh_steps={self.refresh_steps}")
        return self


class EvalConfig(Strict):
    """Evaluation of every arm."""

    split: Literal["dev", "test"] = "test"
    checkpoint: Literal["last", "best"] = Field("last", description="best: lowest dev loss (train.dev_questions)")
    arms: tuple[ArmName, ...] = ("jmlr", "frozen", "separate", "bm25", "random", "closed_book")
    batch_size: PositiveInt = 64
    max_questions: int = Field(0, ge=0, description="0: all")
    bootstrap: PositiveInt = 2000
    hit_at: tuple[PositiveInt, ...] = (1, 5, 10)
    conditions: tuple[Literal["gold", "random"], ...] = Field(
        (), description="what each arm's reader also reads: gold passages (a ceiling), random ones; a pass each"
    )
    permutations: bool = Field(
        False, description="options in every cyclic order; one more pass for each option but the first"
    )
    judge_passages: bool = Field(
        False, description="loss after each passage alone, of those read and those read before training: 2 N passes"
    )
    max_risk: UnitInterval = Field(
        0.2, description="fraction of answers that may be wrong; sets, on dev, how sure an answer must be to be given"
    )


class MeshConfig(Strict):
    """Device mesh; -1 takes what the other axes leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    topology: str | None = Field(None, description="slice that `jmlr plan` compiles for, in chips, e.g. v5e:4x4")


class Config(Strict):
    """Everything a run depends on; saved, resolved, in the run directory."""

    run_dir: LocalPath = "runs/default"
    seed: int = 0
    data: DataConfig = DataConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    generator: GeneratorConfig = GeneratorConfig()
    index: IndexConfig = IndexConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        g, r = self.generator, self.retriever
        shortest = 1 + g.passage_length + g.question_length + g.answer_length
        if g.max_length < shortest:
            raise ValueError(
                f"generator.max_length={g.max_length} cannot hold a passage, the question and its answer ({shortest})"
            )
        if g.positions_known and g.max_length > g.llama.max_positions:
            raise ValueError(
                f"generator.max_length={g.max_length} exceeds generator.llama.max_positions={g.llama.max_positions}"
            )
        for half, shape, lora, stored in (
            ("generator", "generator.llama", g.lora, g.llama.param_dtype),
            ("retriever", "retriever.bert", r.lora, r.bert.param_dtype),
        ):
            if lora is None and stored != "float32":
                raise ValueError(
                    f"{shape}.param_dtype={stored} with {half}.lora=null: all these weights train, and most updates "
                    f"are too small to change one that is stored so; set {shape}.param_dtype=float32 ({shape}.dtype "
                    f"may stay), or {half}.lora={{}} for float32 adapters on a frozen base"
                )
        longest = max(r.query_length, r.passage_length)
        if r.positions_known and longest > r.bert.max_positions:
            raise ValueError(
                f"retriever lengths up to {longest} exceed retriever.bert.max_positions={r.bert.max_positions}"
            )
        return self
