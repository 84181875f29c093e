"""The start that favours copying: what it needs is told with the numbers."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.errors import JmlrError
from jmlr_jax.nn.copying import favour_copying
from jmlr_jax.nn.functional import init_llama

SMALL: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "num_kv_heads": 2}


@pytest.mark.parametrize("wrong", [{"num_kv_heads": 1}, {"tie_embeddings": False}, {"head_dim": 2}])
def test_a_shape_that_it_is_not_defined_for(wrong: dict[str, Any]) -> None:
    cfg, key = LlamaConfig(**SMALL | wrong), jax.random.key(0)
    params = init_llama(cfg, key)
    with pytest.raises(JmlrError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}.*generator.copy_init=0"):
        favour_copying(params, cfg, 0.5, key)
    assert favour_copying(params, cfg, 0, key) is params
