"""Several optimizers in one: each half of the model has its own AdamW, schedule, clipping and decay (method.md, step
7), and so has the importance of query tokens.

Groups are chosen by tree path, and every array must fall into exactly one: the released code of the paper trained
everything at one rate because its groups were matched by a wrong prefix (method.md, faults 1 and 2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax

from jmlr_jax.config import OptimizerConfig
from jmlr_jax.errors import JmlrError

GROUPS = {
    "retriever": r"retriever/(?!(whole/)?importance$).*",
    "importance": r"retriever/(whole/)?importance",
    "generator": r"generator/.*",
}


class GroupError(JmlrError, ValueError):
    """An array of the parameter tree belongs to no optimizer group, or to several."""


def labels(params: Any, groups: Mapping[str, str] = GROUPS) -> Any:
    """The parameter tree with each array replaced by the name of its group.

    Args:
      params: nested dicts of arrays.
      groups: name -> regular expression that the whole path ``a/b/c`` must match.

    Raises:
      GroupError: names every array that matches no group or several.

    >>> labels({"generator": {"embed": 0}, "retriever": {"projection": 0}})
    {'generator': {'embed': 'generator'}, 'retriever': {'projection': 'retriever'}}
    """
    faults: list[str] = []

    def one(path: tuple[Any, ...], _: Any) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = [group for group, pattern in groups.items() if re.fullmatch(pattern, name)]
        if len(found) != 1:
            faults.append(f"{name}: {' and '.join(found) if found else 'no group'}")
        return found[0] if found else ""

    tree = jax.tree_util.tree_map_with_path(one, params)
    if faults:
        raise GroupError("each array needs exactly one optimizer group:\n" + "\n".join(faults))
    return tree


def schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up from 0, then a cosine down to ``final_fraction`` of the peak."""
    warmup = min(cfg.warmup_steps, steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, warmup, steps, cfg.learning_rate * cfg.final_fraction
    )


def make_optimizer(
    retriever: OptimizerConfig, generator: OptimizerConfig, importance: OptimizerConfig, steps: int
) -> optax.GradientTransformation:
    """The optimizer of the tree ``{"retriever": ..., "generator": ...}``; either half may be absent.

    Clipping is by the global norm of each group alone: gradients of one never scale down those of the other.
    """

    def group(one: OptimizerConfig) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(one.clip_norm),
            optax.adamw(schedule(one, steps), one.b1, one.b2, weight_decay=one.weight_decay),
        )

    groups = {"retriever": retriever, "importance": importance, "generator": generator}
    return optax.partition({name: group(one) for name, one in groups.items()}, labels)


def trainable_counts(params: Any) -> dict[str, int]:
    """Trained numbers per group, for the log: nothing is frozen unnoticed."""
    counts = {"retriever": 0, "generator": 0}  # a half without weights is told
    for label, leaf in zip(jax.tree.leaves(labels(params)), jax.tree.leaves(params), strict=True):
        counts[label] = counts.get(label, 0) + leaf.size
    return counts


def state_shardings(optimizer: optax.GradientTransformation, params: Any, param_shardings: Any, replicated: Any) -> Any:
    """Shardings of the optimizer state: moments lie where their parameter lies, counters everywhere.

    Without pinning these a step compiles a second time, when its own output comes back with another layout.
    """
    placed = {_names(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(param_shardings)}

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        names = _names(path)  # of a moment: where it stands in the optimizer's state, then its parameter's path
        ends = (names[start:] for start in range(len(names)))
        return next((placed[end] for end in ends if leaf.ndim and end in placed), replicated)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(optimizer.init, params))


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
