"""Generation against transformers and against recomputation without a cache; sampling against its probabilities."""

from __future__ import annotations

import doctest
import importlib

import hf_map
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jmlr_jax.config import LlamaConfig, LoraConfig
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.generate import generate, nucleus
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
    tokens, length = generate(params, cfg, prompts(), LENGTHS, KEY, max_new=A, eos_id=eos)
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
    one, _ = generate(params, cfg, prompts(0), LENGTHS, KEY, max_new=A, eos_id=V)
    other, _ = generate(params, cfg, prompts(9), LENGTHS, KEY, max_new=A, eos_id=V)
    np.testing.assert_array_equal(one, other)


def test_sliding_window_with_cache(model: tuple) -> None:
    _, cfg, params = model
    narrow = cfg.model_copy(update={"sliding_window": 3})
    tokens, _ = generate(params, narrow, prompts(), LENGTHS, KEY, max_new=A, eos_id=V)
    for row in range(3):
        assert tokens[row].tolist() == recomputed(params, narrow, row, V)


def test_samples_follow_the_probabilities(model: tuple) -> None:
    """Frequencies of 4000 first tokens against the softmax; the truncated ones never occur."""
    _, cfg, params = model
    n, temperature, top_p = 4000, 1.5, 0.8
    prompt = np.tile(prompts()[:1], (n, 1))
    tokens, _ = generate(
        params, cfg, prompt, np.full(n, 6), KEY, max_new=1, eos_id=V, temperature=temperature, top_p=top_p
    )
    hidden = F.llama_hidden(params, cfg, jnp.asarray(prompt[:1]), jnp.array([6]))
    p = np.asarray(jax.nn.softmax(F.llama_logits(params, cfg, hidden[0, 5]) / temperature), float)
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    assert 2 < len(kept) < V
    wanted = np.zeros(V)
    wanted[kept] = p[kept] / p[kept].sum()
    found = np.bincount(np.asarray(tokens[:, 0]), minlength=V) / n
    assert (found[wanted == 0] == 0).all()
    np.testing.assert_allclose(found, wanted, atol=4 * np.sqrt(0.25 / n))


def test_low_temperature_and_small_nucleus_are_greedy_and_keys_matter(model: tuple) -> None:
    _, cfg, params = model
    greedy, _ = generate(params, cfg, prompts(), LENGTHS, KEY, max_new=A, eos_id=V)

    def sample(key: int, temperature: float, top_p: float) -> np.ndarray:
        key_ = jax.random.key(key)
        return np.asarray(
            generate(params, cfg, prompts(), LENGTHS, key_, max_new=A, eos_id=V, temperature=temperature, top_p=top_p)[
                0
            ]
        )

    np.testing.assert_array_equal(sample(1, 1e-4, 1.0), greedy)
    np.testing.assert_array_equal(sample(1, 2.0, 1e-6), greedy)
    np.testing.assert_array_equal(sample(1, 2.0, 1.0), sample(1, 2.0, 1.0))
    assert (sample(1, 2.0, 1.0) != sample(2, 2.0, 1.0)).any()


def test_steps_draw_anew(model: tuple) -> None:
    """With a head of zeros every step chooses evenly, so that only the random numbers tell steps and rows apart."""
    _, cfg, params = model
    even = params | {"lm_head": jnp.zeros_like(params["lm_head"])}
    tokens, _ = generate(even, cfg, prompts(), LENGTHS, KEY, max_new=A, eos_id=V, temperature=1.0)
    assert all(len(set(row)) > 2 for row in tokens.tolist())
    assert len(set(tokens[:, 0].tolist())) > 1 or len(set(tokens[:, 1].tolist())) > 1


def test_nucleus_keeps_the_token_that_crosses_and_always_one() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.98, 0.01, 0.01]]))
    for top_p, kept in ((0.5, [[0, 1, 0], [1, 0, 0]]), (0.7, [[0, 1, 1], [1, 0, 0]]), (1.0, [[1, 1, 1], [1, 1, 1]])):
        assert np.isfinite(nucleus(logits, top_p)).astype(int).tolist() == kept


def test_worked_example() -> None:
    ran = doctest.testmod(importlib.import_module("jmlr_jax.nn.generate"))
    assert ran.attempted and not ran.failed


def test_adapters_generate_as_merged_weights_do(model: tuple) -> None:
    _, cfg, params = model
    lora = LoraConfig(rank=4, alpha=8)
    tree = jax.tree.map(lambda x: 0.3 * jax.random.normal(KEY, x.shape), init_lora(lora, cfg, KEY))
    one, _ = generate(params, cfg, prompts(), LENGTHS, KEY, max_new=A, eos_id=V, adapters=bind(tree, lora))
    other, _ = generate(merge(params, tree, lora), cfg, prompts(), LENGTHS, KEY, max_new=A, eos_id=V)
    base, _ = generate(params, cfg, prompts(), LENGTHS, KEY, max_new=A, eos_id=V)
    np.testing.assert_array_equal(one, other)
    assert (np.asarray(one) != np.asarray(base)).any()


def test_bad_requests_are_refused(model: tuple) -> None:
    _, cfg, params = model
    with pytest.raises(ValueError, match=r"prompt of 6 and max_new=60 tokens reach position 66; max_positions=64"):
        generate(params, cfg, prompts(), LENGTHS, KEY, max_new=60, eos_id=0)
    with pytest.raises(ValueError, match=r"top_p=0\.0"):
        generate(params, cfg, prompts(), LENGTHS, KEY, max_new=4, eos_id=0, temperature=1.0, top_p=0.0)
