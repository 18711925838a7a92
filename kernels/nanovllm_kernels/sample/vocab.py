"""Reductions over a vocabulary that may be split over a mesh axis.

With `axis_name` None the whole vocabulary is here. Otherwise the caller runs inside `shard_map`, holds one
equal part of it in order of the axis, and every shard gets the same result.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array as JaxArray
from jax import lax
from jaxtyping import Array, Float32, Int32


def vocab_offset(size: int, axis_name: str | None) -> JaxArray:
    """The first vocabulary id of this shard of `size` ids, an int32 scalar."""
    if axis_name is None:
        return jnp.int32(0)
    return lax.axis_index(axis_name).astype(jnp.int32) * jnp.int32(size)


def sum_shards(value: JaxArray, axis_name: str | None) -> JaxArray:
    """The sum over the shards."""
    return value if axis_name is None else lax.psum(value, axis_name)


def max_shards(value: JaxArray, axis_name: str | None) -> JaxArray:
    """The maximum over the shards."""
    return value if axis_name is None else lax.pmax(value, axis_name)


def before_reduction(value: JaxArray) -> JaxArray:
    """Has a CPU write the operand of a reduction of several operands; other platforms fuse it as they like.

    XLA computes what is fused into such a reduction one element at a time on a CPU, and four times faster as a
    vectorised loop of its own. On a GPU, writing and reading it would cost more than computing it.
    """
    return lax.platform_dependent(value, cpu=lax.optimization_barrier, default=lambda same: same)


def argmax(
    score: Float32[Array, "B V"], axis_name: str | None = None
) -> tuple[Float32[Array, " B"], Int32[Array, " B"]]:
    """The largest score of each row, a NaN before all, and its vocabulary id, the lowest among equals."""
    ids = lax.broadcasted_iota(jnp.int32, score.shape, 1) + vocab_offset(score.shape[1], axis_name)
    return best_of(before_reduction(score), ids, axis_name)


def best_of(
    score: Float32[Array, "B parts"], ids: Int32[Array, "B parts"], axis_name: str | None
) -> tuple[Float32[Array, " B"], Int32[Array, " B"]]:
    """The largest score of each row and its id, the lowest among equals."""
    best = _reduce_argmax(score, ids)
    if axis_name is None:
        return best
    gathered = [lax.all_gather(part, axis_name, axis=1) for part in best]  # (B, shards)
    return _reduce_argmax(*gathered)


def _reduce_argmax(score: JaxArray, ids: JaxArray) -> tuple[JaxArray, JaxArray]:
    # One reduction of (score, id) pairs: `jnp.argmax` would drop the score, and reading it back is another
    # kernel.
    def pick(left: tuple[JaxArray, JaxArray], right: tuple[JaxArray, JaxArray]) -> tuple[JaxArray, JaxArray]:
        first = (left[0] > right[0]) | (left[0] != left[0]) | ((left[0] == right[0]) & (left[1] < right[1]))
        return jnp.where(first, left[0], right[0]), jnp.where(first, left[1], right[1])

    init = (jnp.float32(-jnp.inf), jnp.int32(jnp.iinfo(jnp.int32).max))
    best_score, best_id = lax.reduce((score, ids), init, pick, (1,))
    return best_score, best_id
