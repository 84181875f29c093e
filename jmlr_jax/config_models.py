"""The schema of both models: shapes, tokenizers, prompt pieces and adapters; the rest of it is in ``config.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, model_validator

from jmlr_jax.files import check_local, check_readable

DType = Literal["float32", "bfloat16", "float16"]


Remat = Literal["none", "full", "attention", "mlp", "dots"]


UnitInterval = Annotated[float, Field(ge=0, le=1)]


TOKENIZER = "a tokenizer directory, or 'train' a small one in `jmlr prepare`; null: the source's, or trained"


LocalPath = Annotated[str, AfterValidator(check_local)]


ReadPath = Annotated[str, AfterValidator(check_readable)]


class Strict(BaseModel):
    """Base of every section: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Strict):
    """What both halves of a run have: first weights and the tokenizer that belongs to them."""

    source: str
    tokenizer: str | None

    @property
    def tokenizer_place(self) -> str | None:
        """Directory that the tokenizer is taken from; None where `jmlr prepare` trains one."""
        place = self.tokenizer or ("train" if self.source == "scratch" else self.source)
        return None if place == "train" else place

    @model_validator(mode="after")
    def _check_tokenizer(self) -> ModelConfig:
        if self.source != "scratch" and self.tokenizer == "train":
            raise ValueError(
                f"tokenizer=train makes ids that the weights of source={self.source} have never seen; leave tokenizer "
                "out to take that directory's own"
            )
        return self


class RopeScalingConfig(Strict):
    """Rotary-embedding scaling as published in Hugging Face ``config.json`` files."""

    type: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float = Field(gt=0)
    original_max_positions: PositiveInt | None = Field(None, description="context length of pre-training")
    low_freq_factor: float = Field(1.0, description="llama3 only")
    high_freq_factor: float = Field(4.0, description="llama3 only")
    beta_fast: float = Field(32.0, description="yarn only")
    beta_slow: float = Field(1.0, description="yarn only")
    attention_factor: float | None = Field(None, description="yarn only; None derives it from the factor")


class AttentionConfig(Strict):
    """What tokens see, and how their positions turn queries and keys, by layer."""

    sliding_window: PositiveInt | None = Field(
        None,
        description="of a decoder: keys so far back, and further, are hidden; of an encoder: those further away on "
        "either side",
    )
    layer_kinds: tuple[Literal["full", "window"], ...] = Field(
        (),
        description="which layers have the window, repeated over the layers, e.g. [window, window, full]; [] all do",
    )
    rope_theta: float = 10_000.0
    rope_scaling: RopeScalingConfig | None = None
    window_rope_theta: float | None = Field(
        None, description="rotary base of layers with a window, not scaled; null: that of the others, scaled as theirs"
    )

    @model_validator(mode="after")
    def _check_kinds(self) -> AttentionConfig:
        if self.sliding_window is None and (self.layer_kinds or self.window_rope_theta is not None):
            raise ValueError("layer_kinds and window_rope_theta speak of a window; set sliding_window")
        return self

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None where it sees every key."""
        kinds = self.layer_kinds or ("window",)
        count: int = self.num_layers  # type: ignore[attr-defined]  # of either model
        return tuple(self.sliding_window if kinds[i % len(kinds)] == "window" else None for i in range(count))


class LlamaConfig(AttentionConfig):
    """Shape of a Llama-family decoder (Llama 2/3, Mistral, Qwen2, Qwen3, Gemma 3)."""

    block: Literal["llama", "gemma"] = Field(
        "llama", description="gemma: four norms a layer, each times one plus its weight, tanh GELU, scaled embeddings"
    )
    vocab_size: int = Field(0, ge=0, description="0 takes the tokenizer's size")
    hidden_size: PositiveInt = 64
    intermediate_size: PositiveInt = 128
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 4
    head_dim: PositiveInt | None = Field(None, description="None: hidden_size / num_heads")
    max_positions: PositiveInt = 512
    query_pre_attn_scalar: PositiveInt | None = Field(
        None, description="Gemma: scores are divided by its root; null: by that of the head's width"
    )
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = Field(False, description="Qwen2")
    qk_norm: bool = Field(False, description="Qwen3, Gemma 3: RMSNorm on each head's query and key")
    dtype: DType = Field("float32", description="of activations and matrix products")
    param_dtype: DType = Field("float32", description="of stored weights")
    remat: Remat = Field(
        "none",
        description="full: the backward pass recomputes each layer; attention, mlp, dots: the products of that part, "
        "or of both, stay in memory; none: all does",
    )

    @model_validator(mode="after")
    def _check(self) -> LlamaConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        return self

    @property
    def head_width(self) -> int:
        """E: numbers in one head's query."""
        return self.head_dim or self.hidden_size // self.num_heads


class BertConfig(AttentionConfig):
    """Shape of an encoder, the retriever's trunk: BERT, or ModernBERT, which alone has windows and rotary positions."""

    block: Literal["bert", "modernbert"] = Field(
        "bert", description="modernbert: norms before attention and a gated network, no biases, rotary positions"
    )
    vocab_size: int = Field(0, ge=0, description="0 takes the tokenizer's size")
    hidden_size: PositiveInt = 64
    intermediate_size: PositiveInt = 128
    num_layers: PositiveInt = 1
    num_heads: PositiveInt = 2
    max_positions: PositiveInt = 128
    type_vocab_size: PositiveInt = Field(2, description="BERT only")
    layer_norm_eps: float = 1e-12
    hidden_act: Literal["gelu", "gelu_new", "relu"] = "gelu"
    dtype: DType = "float32"
    param_dtype: DType = "float32"
    remat: Remat = "none"

    @model_validator(mode="after")
    def _check(self) -> BertConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        if self.block == "bert":
            plain = AttentionConfig()
            if any(getattr(self, name) != getattr(plain, name) for name in AttentionConfig.model_fields):
                names = ", ".join(AttentionConfig.model_fields)
                raise ValueError(f"{names} are of block=modernbert; a BERT has neither window nor rotary positions")
        return self

    @property
    def head_width(self) -> int:
        """E: numbers in one head's query."""
        return self.hidden_size // self.num_heads


class AdapterConfig(Strict):
    """Low-rank adapters on a frozen base: a weight is ``base + alpha / rank * a b``."""

    rank: PositiveInt
    alpha: float
    targets: tuple[str, ...]
    whole: tuple[str, ...]


class EncoderLoraConfig(AdapterConfig):
    """Adapters on the encoder's projections; an encoder has no dropout, and neither have they."""

    rank: PositiveInt = 16
    alpha: float = 32.0
    targets: tuple[Literal["q", "k", "v", "qkv", "o", "up", "down"], ...] = Field(
        ("q", "k", "v", "o", "up", "down"), description="of ModernBERT: qkv, o, up, down"
    )
    whole: tuple[str, ...] = Field(
        ("projection",),
        description="weights of the base that train entirely, by name: projection (to token vectors; random where a "
        "plain encoder is the start), word, attn_norm, mlp_norm, ...",
    )


class RetrieverConfig(ModelConfig):
    """The late-interaction encoder and how text becomes its tokens (method.md, step 1)."""

    source: ReadPath = Field(
        "scratch", description="'scratch' (random weights of shape `bert`) or a Hugging Face directory"
    )
    tokenizer: LocalPath | None = Field(None, description=TOKENIZER)
    tokenizer_vocab: PositiveInt = Field(4096, description="size of the tokenizer that 'train' makes")
    bert: BertConfig = BertConfig()
    lora: EncoderLoraConfig | None = Field(None, description="null trains every weight, as the paper does")
    dim: PositiveInt = Field(32, description="C: width of a token vector (128 in the paper)")
    query_length: PositiveInt = Field(13, description="Q: query tokens, markers and augmentation included")
    passage_length: PositiveInt = Field(28, description="P: passage tokens, markers included")
    query_template: str = Field(
        "{question}", description="fields: question, last_sentence (what a long case report asks in the end), options"
    )
    passage_template: str = Field("{title}. {text}", description="fields: title, text")
    query_marker: str = Field("[Q]", description="token after [CLS] in queries; [unused0] in published ColBERTs")
    passage_marker: str = Field("[D]", description="token after [CLS] in passages; [unused1] in published ColBERTs")
    augment_queries: bool = Field(True, description="fill queries up to Q with [MASK], as ColBERT does")
    importance: bool = Field(
        False, description="learn how much each query token counts in MaxSim, from equal weights; not in the paper"
    )
    attend_to_mask_tokens: bool = Field(False, description="whether other tokens attend to the augmentation")
    skip_punctuation: bool = Field(True, description="passage punctuation takes no part in MaxSim")

    @property
    def positions_known(self) -> bool:
        """Whether ``bert.max_positions`` is said here; else the source says it."""
        return _said(self.source, self.bert)

    @model_validator(mode="after")
    def _check(self) -> RetrieverConfig:
        if fault := unattended(self):
            raise ValueError(fault)
        if self.importance and self.lora is not None and "importance" not in self.lora.whole:
            raise ValueError(
                "retriever.importance=true with retriever.lora: it would never train; name it in retriever.lora.whole"
            )
        return self


def unattended(cfg: RetrieverConfig) -> str:
    """Why nobody would compute these queries alike, or nothing: FlashAttention, which ModernBERTs are trained and run
    with, gives no vectors for tokens that are not attended to."""
    if cfg.bert.block == "modernbert" and cfg.augment_queries and not cfg.attend_to_mask_tokens:
        return (
            "retriever.augment_queries=true with a ModernBERT needs attend_to_mask_tokens=true; published ones have "
            "neither: set retriever.augment_queries=false"
        )
    return ""


class LoraConfig(AdapterConfig):
    """Low-rank adapters on the decoder's projections; the defaults are the paper's."""

    rank: PositiveInt = 128
    alpha: float = 256.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down", "lm_head")
    whole: tuple[str, ...] = Field(
        (), description="weights of the base that train entirely, by name: embed, attn_norm, mlp_norm, final_norm, ..."
    )
    dropout: float = Field(0.05, ge=0, lt=1)


class GeneratorConfig(ModelConfig):
    """The language model and its prompt pieces; each piece has its own length, set here and nowhere else."""

    source: ReadPath = Field(
        "scratch", description="'scratch' (random weights of shape `llama`) or a Hugging Face directory"
    )
    tokenizer: LocalPath | None = Field(None, description=TOKENIZER)
    tokenizer_vocab: PositiveInt = Field(4096, description="size of the tokenizer that 'train' makes")
    tokenizer_lowercase: bool = Field(
        False, description="a tokenizer made here reads small letters only: a word is the same wherever it stands"
    )
    llama: LlamaConfig = LlamaConfig()
    chat: bool = Field(
        False, description="the prompt is the user's turn of the tokenizer's chat template, as instruct models expect"
    )
    system: str | None = Field(None, description="text of the system turn, with chat")
    copy_init: float = Field(
        0.7, ge=0, le=1, description="scratch only: how much attention starts as a copier (nn/copying.py)"
    )
    lora: LoraConfig | None = Field(None, description="null trains every weight")
    passage_length: PositiveInt = Field(28, description="L: tokens of one rendered passage")
    question_length: PositiveInt = Field(36, description="S: tokens of the rendered question and options")
    answer_length: PositiveInt = Field(3, description="A: tokens of the answer, end token included")
    max_length: PositiveInt = Field(
        512, description="T: whole prompt; passages that do not fit are dropped, worst first"
    )
    passage_template: str = "\nReference:\n{title}. {text}"
    question_template: str = "\nMy Question:\n{question}\n{options}\nAnswer:"
    option_template: str = Field("{letter}) {option}", description="one option; joined by spaces")
    answer_template: str = " {answer}"
    answer_form: Literal["text", "letter"] = Field("text", description="the answer is the option's text or its letter")

    @property
    def positions_known(self) -> bool:
        """Whether ``llama.max_positions`` is said here; else the source says it."""
        return _said(self.source, self.llama)

    @model_validator(mode="after")
    def _check_chat(self) -> GeneratorConfig:
        if self.system is not None and not self.chat:
            raise ValueError("system is the text of a chat template's turn; set chat=true, or leave it out")
        return self


def _said(source: str, shape: LlamaConfig | BertConfig) -> bool:
    return source == "scratch" or "max_positions" in shape.model_fields_set
