"""The gate and up projections of an MLP with its activation, for many rows."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanovllm_kernels._checks import check_backend, check_float
from nanovllm_kernels._compat import current_target, import_jax_triton
from nanovllm_kernels.silu_mul import silu_mul

_MOSAIC_CAPABILITY = 90  # wgmma, which later GPUs do not have
# Tiles a multiprocessor: with fewer, some have none of the last round. 2,048 rows of Qwen3-0.6B are 2.9.
_LEAST_FILL = 2
# The longer the sums, the less the activation's own pass costs beside cuBLAS's product, which alone is the faster one.
_MOST_INPUTS = 1024


def gated_matmul(
    x: Float[Array, "T E"],
    w: Float[Array, "E 2 F"],
    *,
    bias: Float[Array, "2 F"] | None = None,
    backend: Literal["xla", "triton"],
) -> Float[Array, "T F"]:
    """`silu(x @ gate + gate_bias) * (x @ up + up_bias)`, where `w[:, 0]` is gate and `w[:, 1]` up.

    From Shazeer 2020 (https://arxiv.org/abs/2002.05202). T tokens, E model dim, F MLP dim; sums are float32. With
    `"triton"` many short 16-bit rows are one kernel in Pallas Mosaic GPU on sm_90, which never writes gate and up;
    elsewhere it is XLA's product, rounded to x's dtype, and `silu_mul`.

    Raises:
        ValueError: if shapes or dtypes do not fit together, or the backend is unknown.
        ImportError: if the GPU implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    check_float(x=x)
    if x.ndim != 2 or w.ndim != 3 or w.shape[:2] != (x.shape[1], 2) or w.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}{x.shape} and w {w.dtype}{w.shape}; they must be [T, E] and [E, 2, F], alike.")
    if bias is not None and (bias.shape != w.shape[1:] or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype}{bias.shape}; it must be [2, F], here {x.dtype}{w.shape[1:]}.")
    if backend == "triton" and bias is None and _has_kernel(x, w):
        from nanovllm_kernels.gated_matmul.mosaic import gated_matmul_mosaic

        return gated_matmul_mosaic(x, w)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    gate_up = jnp.einsum("te,ezf->tzf", x, w, precision=precision)
    return silu_mul(gate_up if bias is None else gate_up + bias, backend=backend)


def _has_kernel(x: Array, w: Array) -> bool:
    import_jax_triton()
    target = current_target()
    if target.compute_capability != _MOSAIC_CAPABILITY or x.dtype.itemsize != 2:
        return False
    from nanovllm_kernels.gated_matmul.mosaic_device import fits, num_tiles

    (rows, inputs), outputs = x.shape, w.shape[2]
    worth_it = num_tiles(rows, outputs) >= _LEAST_FILL * target.multiprocessors and inputs <= _MOST_INPUTS
    return worth_it and fits(rows=rows, inputs=inputs, outputs=outputs)
