"""Reductions over the shards of a model; with one shard (`axis_name` None) they change nothing."""

from __future__ import annotations

from jax import Array, lax


def sum_shards(value: Array, axis_name: str | None) -> Array:
    """The sum over the shards."""
    return value if axis_name is None else lax.psum(value, axis_name)


def max_shards(value: Array, axis_name: str | None) -> Array:
    """The maximum over the shards."""
    return value if axis_name is None else lax.pmax(value, axis_name)
