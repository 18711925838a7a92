"""Caches in float8 (e4m3): what is stored, and which types hold it exactly."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

FP8 = jnp.dtype(jnp.float8_e4m3fn)
FP8_MAX = 448.0


def quantise(x: Array, dtype: DTypeLike, scale: Array | None) -> Array:
    """`x` [T, K, D] as it is stored: cast, and for float8 divided by its KV head's scale [K] and saturated."""
    if jnp.dtype(dtype) != FP8:
        return x.astype(dtype)
    wide = x.astype(jnp.float32)
    if scale is not None:
        wide = wide / scale.astype(jnp.float32)[:, None]
    return jnp.clip(wide, -FP8_MAX, FP8_MAX).astype(dtype)


def as_bytes(x: Array) -> Array:
    """Float8 as bytes, other types as they are; `view` turns them back.

    What XLA's gathers and scatters take of float8 should be bytes: on a CPU they convert the whole array to float16,
    and back. A caller that keeps its cache as bytes, and views it as float8 for a kernel, pays for what is read and
    written alone.
    """
    return x.view(jnp.uint8) if x.dtype == FP8 else x
