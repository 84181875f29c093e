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


class LlamaConfig(Strict):
    """Shape of a Llama-family decoder (Llama 2/3, Mistral, Qwen2, Qwen3)."""

    vocab_size: int = Field(0, ge=0, description="0 takes the tokenizer's size")
    hidden_size: PositiveInt = 64
    intermediate_size: PositiveInt = 128
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 4
    head_dim: PositiveInt | None = Field(None, description="None: hidden_size / num_heads")
    max_positions: PositiveInt = 512
    rope_theta: float = 10_000.0
    rope_scaling: RopeScalingConfig | None = None
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = Field(False, description="Qwen2")
    qk_norm: bool = Field(False, description="Qwen3: RMSNorm on each head's query and key")
    sliding_window: PositiveInt | None = Field(None, description="Mistral: keys further back are masked")
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


class BertConfig(Strict):
    """Shape of a BERT-family encoder (the retriever's trunk)."""

    vocab_size: int = Field(0, ge=0, description="0 takes the tokenizer's size")
    hidden_size: PositiveInt = 64
    intermediate_size: PositiveInt = 128
    num_layers: PositiveInt = 1
    num_heads: PositiveInt = 2
    max_positions: PositiveInt = 128
    type_vocab_size: PositiveInt = 2
    layer_norm_eps: float = 1e-12
    hidden_act: Literal["gelu", "gelu_new", "relu"] = "gelu"
    dtype: DType = "float32"
    param_dtype: DType = "float32"
    remat: Remat = "none"

    @model_validator(mode="after")
    def _check(self) -> BertConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        return self


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
    targets: tuple[Literal["q", "k", "v", "o", "up", "down"], ...] = ("q", "k", "v", "o", "up", "down")
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
    query_template: str = Field("{question}", description="fields: question, options")
    passage_template: str = Field("{title}. {text}", description="fields: title, text")
    query_marker: str = Field("[Q]", description="token after [CLS] in queries; [unused0] in published ColBERTs")
    passage_marker: str = Field("[D]", description="token after [CLS] in passages; [unused1] in published ColBERTs")
    augment_queries: bool = Field(True, description="fill queries up to Q with [MASK], as ColBERT does")
    attend_to_mask_tokens: bool = Field(False, description="whether other tokens attend to the augmentation")
    skip_punctuation: bool = Field(True, description="passage punctuation takes no part in MaxSim")


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
