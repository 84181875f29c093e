"""What a server relies on: a search compiles nothing that :meth:`ScannIndex.compile` has compiled before."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from indexes import CFG, clustered, scann_index

from jmlr_jax.retrieval.tokens import gather


@pytest.mark.exhaustive
@pytest.mark.parametrize("bits", [4, 16])
def test_what_was_compiled_before_serves_every_question(bits):
    vectors, q = clustered(300, 24)
    # Passages of one token and of 90: a number of hits then has many numbers of tiles.
    long = np.tile(vectors.vectors_NxPxC, (1, 12, 1))[:, :90]
    keep = np.arange(90) < np.where(np.arange(300) % 3, 1, 90)[:, None]
    vectors = type(vectors)(long, keep)
    index = scann_index(vectors, CFG.model_copy(update={"bits": bits, "rerank": 24}))
    index.compile(7, q.shape[1])
    for batch in (1, 8):  # the shapes that do not depend on the hits
        index.search(np.repeat(q[:1], batch, axis=0), 7)
    seen: list[str] = []

    def compiled(event: str, duration_secs: float, **more: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(compiled)
    for one in q:
        index.search(one[None], 7)
    index.search(q[:8], 7)
    assert seen == []
    stores = [part.tokens for part in index.parts]
    sizes = {len(gather(stores, (), index.nearest(one[None], 24)[0][0]).owner_R) for one in q}
    assert len(sizes) > 2  # else the test shows nothing
