"""XLA implementation: its all-reduce, and an addition."""

from __future__ import annotations

from jax import lax
from jaxtyping import Array, Float


def add_shards_xla(
    part: Float[Array, "*shape"], residual: Float[Array, "*shape"] | None, axis_name: str
) -> Float[Array, "*shape"]:
    """See `add_shards`."""
    total = lax.psum(part, axis_name)
    return total if residual is None else residual + total
