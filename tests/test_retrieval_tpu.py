"""What an index runs on the device, compiled by the TPU compiler: it fits beside a model, and fuses what it unpacks."""

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from jmlr_jax.config import IndexConfig
from jmlr_jax.planning.plan import slice_of
from jmlr_jax.retrieval.code import encode_tokens, fit_code
from jmlr_jax.retrieval.encoding import plain_encoding, query_vectors, reduced
from jmlr_jax.retrieval.fde import fit_fde
from jmlr_jax.retrieval.tokens import ENCODE_BATCH, TILE, Tiles, score_tokens

DIM, QUERY, ROWS = 128, 32, 8192  # a question and 8,192 tiles of 32 tokens: about 1,500 passages of 180 tokens
MIB = 2**20


@pytest.fixture(scope="module")
def compiled():
    """Memory in MiB that a jitted function takes beside its arguments on one v5e chip, from arrays of its arguments."""
    where = SingleDeviceSharding(slice_of("v5e:2x2")[1][0])

    def temporary(function, *arrays, **static) -> float:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=where), arrays)
        return function.lower(*shapes, **static).compile().memory_analysis().temp_size_in_bytes / MIB

    # Other tests keep what they compile; what is kept of a TPU program cannot be read without a TPU.
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield temporary
    jax.config.update("jax_enable_compilation_cache", kept)
    compilation_cache.reset_cache()


@pytest.mark.exhaustive
@pytest.mark.parametrize("bits", [2.25, 4])
def test_token_codes_are_scored_in_little_memory(compiled, bits):
    """Unpacked to float32 the tiles alone would take 128 MiB."""
    rng = np.random.default_rng(0)
    code = fit_code(rng.normal(size=(4096, DIM)).astype(np.float32) / DIM**0.5, bits, 20_000, 0)
    arrays = {
        "centroid": np.zeros((ROWS, TILE), np.uint16),
        "residual": np.zeros((ROWS, TILE, code.residual_bytes), np.uint8),
        "gain": np.zeros((ROWS, TILE), np.uint8),
    }
    question = np.zeros((QUERY, DIM), np.float32)
    for names in (("centroid",), tuple(arrays)):
        tiles = Tiles({name: arrays[name] for name in names}, np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32))
        assert compiled(score_tokens, code, question, tiles, hits=1500) < 64, names
    assert compiled(encode_tokens, code, np.zeros((ENCODE_BATCH, DIM), np.float32)) < 512


def test_questions_are_encoded(compiled):
    rng = np.random.default_rng(0)
    encoding = plain_encoding(fit_fde(rng.normal(size=(500, DIM)), IndexConfig().fde_partitions, 0))
    encoding = reduced(encoding, rng.normal(size=(40, encoding.width)).astype(np.float32), 32)
    assert compiled(query_vectors, encoding, np.zeros((64, QUERY, DIM), np.float32)) < 512
