"""Generation against transformers and against recomputation without a cache."""

from __future__ import annotations

import hf_map
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jmlr_jax.config_models import LlamaConfig, LoraConfig
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.generate import generate
from jmlr_jax.nn.lora import bind, init_lora, merge

V, A = 31, 8
LENGTHS = np.array([6, 2, 4])
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model() -> tuple[torch.nn.Module, LlamaConfig, dict]:
    torch.manual_seed(3)
    hf = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch_model = transformers.LlamaForCausalLM(hf).eval()
    for p in torch_model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3)
    cfg = hf_map.llama_config(hf)
    return torch_model, cfg, hf_map.llama_params(torch_model, cfg)


def prompts(filling: int = 0) -> np.ndarray:
    ids = np.random.default_rng(1).integers(1, V, (3, 6))
    return np.where(np.arange(6) < LENGTHS[:, None], ids, filling)


def recomputed(params: dict, cfg: LlamaConfig, row: int, eos: int) -> list[int]:
    """Greedy continuation of one prompt, the whole sequence run anew for each token."""

    @jax.jit
    def likeliest(ids: jax.Array, n: jax.Array) -> jax.Array:
        hidden = F.llama_hidden(params, cfg, ids, n[None])
        return F.llama_logits(params, cfg, hidden[0, n - 1]).argmax()

    ids, n = np.zeros((1, 6 + A), int), int(LENGTHS[row])
    ids[0, :n] = prompts()[row, :n]
    out: list[int] = []
    while len(out) < A and eos not in out:
        out.append(int(likeliest(jnp.asarray(ids), jnp.int32(n + len(out)))))
        ids[0, n + len(out) - 1] = out[-1]
    return out


def end_token(model: tuple) -> int:
    """A token that the second prompt reaches in the middle, so that rows end at different times."""
    _, cfg, params = model
    return recomputed(params, cfg, 1, -1)[3]


def test_greedy_equals_transformers_and_recomputation(model: tuple) -> None:
    torch_model, cfg, params = model
    eos = end_token(model)
    tokens, length = generate(params, cfg, prompts(), LENGTHS, max_new=A, eos_id=eos)
    assert tokens.shape == (3, A) and tokens.dtype == length.dtype == jnp.int32
    assert length[1] <= 4 and length.max() > length.min()
    for row, n in enumerate(LENGTHS):
        made = tokens[row, : length[row]].tolist()
        with torch.no_grad():
            theirs = torch_model.generate(
                torch.tensor(prompts()[row : row + 1, :n]),
                attention_mask=torch.ones(1, int(n), dtype=torch.long),
                max_new_tokens=A,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=eos,
            )[0, n:].tolist()
        assert made == theirs == recomputed(params, cfg, row, eos)
        assert (tokens[row, length[row] :] == eos).all()


def test_filling_of_the_prompt_does_not_matter(model: tuple) -> None:
    _, cfg, params = model
    one, _ = generate(params, cfg, prompts(0), LENGTHS, max_new=A, eos_id=V)
    other, _ = generate(params, cfg, prompts(9), LENGTHS, max_new=A, eos_id=V)
    np.testing.assert_array_equal(one, other)


def test_sliding_window_with_cache(model: tuple) -> None:
    _, cfg, params = model
    narrow = cfg.model_copy(update={"sliding_window": 3})
    tokens, _ = generate(params, narrow, prompts(), LENGTHS, max_new=A, eos_id=V)
    for row in range(3):
        assert tokens[row].tolist() == recomputed(params, narrow, row, V)


@pytest.mark.exhaustive
def test_adapters_generate_as_merged_weights_do(model: tuple) -> None:
    _, cfg, params = model
    lora = LoraConfig(rank=4, alpha=8)
    tree = jax.tree.map(lambda x: 0.3 * jax.random.normal(KEY, x.shape), init_lora(lora, cfg, KEY))
    one, _ = generate(params, cfg, prompts(), LENGTHS, max_new=A, eos_id=V, adapters=bind(tree, lora))
    other, _ = generate(merge(params, tree, lora), cfg, prompts(), LENGTHS, max_new=A, eos_id=V)
    base, _ = generate(params, cfg, prompts(), LENGTHS, max_new=A, eos_id=V)
    np.testing.assert_array_equal(one, other)
    assert (np.asarray(one) != np.asarray(base)).any()


def test_bad_requests_are_refused(model: tuple) -> None:
    _, cfg, params = model
    with pytest.raises(ValueError, match=r"prompt of 6 and max_new=60 tokens reach position 66; max_positions=64"):
        generate(params, cfg, prompts(), LENGTHS, max_new=60, eos_id=0)
    with pytest.raises(ValueError, match="max_new=0"):
        generate(params, cfg, prompts(), LENGTHS, max_new=0, eos_id=0)
