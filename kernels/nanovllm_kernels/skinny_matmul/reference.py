"""XLA implementation: norm, product and epilogue as separate operations, float32 between them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm_xla(x: Float[Array, "M K"], norm: Float[Array, " K"], eps: float) -> Float[Array, "M K"]:
    """Normalised rows in x's dtype."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + eps)
    return (wide * scale * norm.astype(jnp.float32)).astype(x.dtype)


def skinny_matmul_xla(
    x: Float[Array, "M K"],
    w: Array,
    *,
    norm: Float[Array, " K"] | None,
    eps: float,
    w_scale: Array | None,
    bias: Array | None,
    residual: Float[Array, "M N"] | None,
    w_layout: str,
    out_dtype: jnp.dtype,
) -> Float[Array, "M N"]:
    if norm is not None:
        x = rms_norm_xla(x, norm, eps)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    # Every e4m3 number is a bfloat16 and a float16 number.
    contracting = ((1,), (1 if w_layout == "nk" else 0,))
    dimensions = (contracting, ((), ()))
    y = lax.dot_general(
        x, w.astype(x.dtype), dimensions, precision=precision, preferred_element_type=jnp.float32
    )  # [M, N], or [M, 2, N] for gate and up
    if w_scale is not None:
        y = y * w_scale
    if bias is not None:
        y = y + bias
    if w.ndim == 3:
        y = jax.nn.silu(y[:, 0]) * y[:, 1]
    if residual is not None:
        y = y + residual
    return y.astype(out_dtype)
