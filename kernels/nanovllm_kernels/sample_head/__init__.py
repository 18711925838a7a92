"""Draws a token a row from hidden states: the output head and `sample` without filters, logits never written."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt32

from nanovllm_kernels._checks import check_backend, check_float, check_int32, check_shape
from nanovllm_kernels._compat import import_jax_triton
from nanovllm_kernels.sample_head.reference import sample_head_xla


def sample_head(
    hidden: Float[Array, "B E"],
    head: Float[Array, "V E"],
    temperature: Float32[Array, " B"],
    key: UInt32[Array, "B 2"],
    position: Int32[Array, " B"],
    *,
    backend: Literal["xla", "triton"],
) -> Int32[Array, " B"]:
    """`sample` of the float32 logits `hidden @ head.T`.

    B rows, E model dim, V vocabulary. Logits and noise race tile by tile as the product makes them, and of each tile
    of the vocabulary only the best score of a row is kept (as in FlashSampling, where the noise is added to the tiles
    of the output head too).

    Args:
        hidden: float32, bfloat16 or float16; float32 runs through XLA with either backend.
        head: of hidden's dtype.
        temperature: as `sample` takes it; `key` and `position` too.
        key: 64 random bits a row.
        position: index of the token to draw in its sequence.
        backend: "xla" anywhere, "triton" on NVIDIA GPUs from sm_80 up.

    Returns:
        token ids; -1 where a row's logits hold a NaN or +inf, or nothing but -inf.

    Raises:
        ValueError: if shapes or dtypes do not fit together, or the backend is unknown.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    check_float(hidden=hidden)
    check_int32(position=position)
    if hidden.ndim != 2 or head.ndim != 2 or 0 in head.shape or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"hidden has shape {hidden.shape} and head {head.shape}; they must be [B, E] and [V, E], E and V above 0."
        )
    if head.dtype != hidden.dtype:
        raise ValueError(f"head has dtype {head.dtype}; it must be hidden's, {hidden.dtype}.")
    rows = (hidden.shape[0],)
    check_shape("temperature", temperature, rows, "B")
    check_shape("key", key, (*rows, 2), "B, 2")
    check_shape("position", position, rows, "B")
    for name, value, expected in (("temperature", temperature, jnp.float32), ("key", key, jnp.uint32)):
        if value.dtype != expected:
            raise ValueError(f"{name} has dtype {value.dtype}; it must be {jnp.dtype(expected)}.")
    if rows == (0,):
        return jnp.zeros(rows, jnp.int32)
    if backend == "xla" or hidden.dtype == jnp.float32:
        return sample_head_xla(hidden, head, temperature, key, position)
    import_jax_triton()
    from nanovllm_kernels.sample_head.triton import sample_head_triton

    return sample_head_triton(hidden, head, temperature, key, position)
