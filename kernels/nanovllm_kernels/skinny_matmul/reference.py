"""XLA implementation: norm, product and epilogue as separate operations, float32 between them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from nanovllm_kernels.skinny_matmul.launch import padded_rows


def rms_norm_xla(x: Float[Array, "M K"], norm: Float[Array, " K"], eps: float) -> Float[Array, "M K"]:
    """Normalised rows in x's dtype."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + eps)
    return (wide * scale * norm.astype(jnp.float32)).astype(x.dtype)


def scaled_xla(x: Float[Array, "M K"], norm: Float[Array, " K"]) -> tuple[Float[Array, "M K"], Float[Array, "1 rows"]]:
    """Rows times a norm's weight in x's dtype, and the sums of their squares, as products pass them on."""
    wide = x.astype(jnp.float32)
    squares = jnp.pad(jnp.sum(wide * wide, axis=1), (0, padded_rows(x.shape[0]) - x.shape[0]))
    return (wide * norm.astype(jnp.float32)).astype(x.dtype), squares[None]


def skinny_matmul_xla(
    x: Float[Array, "M K"],
    w: Array,
    *,
    norm: Float[Array, " K"] | None,
    eps: float,
    w_scale: Array | None,
    bias: Array | None,
    residual: Float[Array, "M N"] | None,
    squares: Float[Array, "parts rows"] | None,
    next_norm: Float[Array, " N"] | None,
    w_layout: str,
    out_dtype: jnp.dtype,
) -> list[Array]:
    """As `skinny_matmul`; a list of all results."""
    if norm is not None:
        x = rms_norm_xla(x, norm, eps)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    # Every e4m3 number is a bfloat16 and a float16 number.
    contracting = ((1,), (1 if w_layout == "nk" else 0,))
    dimensions = (contracting, ((), ()))
    y = lax.dot_general(
        x, w.astype(x.dtype), dimensions, precision=precision, preferred_element_type=jnp.float32
    )  # [M, N], or [M, 2, N] for gate and up
    if squares is not None:
        mean = jnp.sum(squares[:, : x.shape[0]], axis=0) / x.shape[1]
        y = y * lax.rsqrt(mean + eps).reshape(-1, *[1] * (y.ndim - 1))
    if w_scale is not None:
        y = y * w_scale
    if bias is not None:
        y = y + bias
    if w.ndim == 3:
        y = jax.nn.silu(y[:, 0]) * y[:, 1]
    if residual is not None:
        y = y + residual
    y = y.astype(out_dtype)
    return [y] if next_norm is None else [y, *scaled_xla(y, next_norm)]
