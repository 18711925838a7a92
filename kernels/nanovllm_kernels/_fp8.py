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
