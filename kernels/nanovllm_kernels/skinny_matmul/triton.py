"""Triton implementation: launch of the kernels in `device.py` and `device_finish.py`; the weight is read once.

With few output tiles K is split over programs (split-K, as in Stream-K, https://arxiv.org/abs/2301.03598). Their
partial sums are added in a fixed order, so results repeat to the bit: by the tile's last program to arrive, which
an atomic counter tells, or by a second kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanovllm_kernels._compat import triton_call
from nanovllm_kernels._device import dot_dtype
from nanovllm_kernels._integers import ceil_div, next_power_of_2
from nanovllm_kernels.skinny_matmul.device import product_kernel
from nanovllm_kernels.skinny_matmul.device_finish import merge_splits_kernel
from nanovllm_kernels.skinny_matmul.launch import Launch, padded_rows

_MERGE_COLS = 128


def skinny_matmul_triton(
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
    counters: jax.Ref | None,
    launch: Launch,
) -> list[Array]:
    """As `skinny_matmul`; a list of all results."""
    (num_rows, num_inputs), gated = x.shape, w.ndim == 3
    num_outputs = w.shape[0] if w_layout == "nk" else w.shape[-1]
    if norm is not None:
        norm = norm.astype(x.dtype)
    splits = launch.splits
    tiles = ceil_div(num_rows, launch.tile_rows) * ceil_div(num_outputs, launch.tile_cols)
    if splits == 1 or (counters is not None and tiles > counters.shape[0]):
        counters = None
    merged = splits > 1 and counters is None
    merge_cols = min(_MERGE_COLS, next_power_of_2(num_outputs))
    out = jax.ShapeDtypeStruct((num_rows, num_outputs), out_dtype)
    unused = jax.ShapeDtypeStruct((1,), jnp.float32)
    results = [out, unused, unused]
    if next_norm is not None:
        col_tiles = ceil_div(num_outputs, merge_cols if merged else launch.tile_cols)
        results[1:] = out, jax.ShapeDtypeStruct((col_tiles, padded_rows(num_rows)), jnp.float32)
    parts = jax.ShapeDtypeStruct((splits, num_rows, num_outputs * (1 + gated)), jnp.float32)
    split_squares = jax.ShapeDtypeStruct((splits, num_rows), jnp.float32)
    constants = {
        "NUM_INPUTS": num_inputs,
        "NUM_OUTPUTS": num_outputs,
        "EPS": eps,
        "GATED": gated,
        "SCALE_STRIDE": int(w_scale is not None and w_scale.ndim > 0),
        "SPLITS": splits,
        "NORMED": norm is not None or squares is not None,
        "GIVEN_PARTS": 0 if squares is None else len(squares),
        "ROW_STRIDE": padded_rows(num_rows),
    }
    *first, parts, split_squares = triton_call(
        x,
        w,
        norm,
        w_scale,
        bias,
        residual,
        squares,
        next_norm,
        counters,
        num_rows,
        kernel=product_kernel,
        out_type=(
            *([unused] * 3 if merged else results),
            parts if splits > 1 else unused,
            split_squares if splits > 1 and norm is not None else unused,
        ),
        grid=(tiles, splits),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        W_STRIDE_IN=1 if w_layout == "nk" else num_outputs * (1 + gated),
        W_STRIDE_OUT=num_inputs if w_layout == "nk" else 1,
        DOT_DTYPE=dot_dtype(x.dtype, x.dtype),
        SPLIT_INPUTS=ceil_div(num_inputs, splits * launch.tile_inputs) * launch.tile_inputs,
        TILE_ROWS=launch.tile_rows,
        TILE_COLS=launch.tile_cols,
        TILE_INPUTS=launch.tile_inputs,
        SWAP=launch.swap,
        STAGES=launch.num_stages,
        **constants,
    )
    if merged:
        first = triton_call(
            parts,
            split_squares,
            norm,
            w_scale,
            bias,
            residual,
            squares,
            next_norm,
            num_rows,
            kernel=merge_splits_kernel,
            out_type=tuple(results),
            grid=(num_rows, ceil_div(num_outputs, merge_cols)),
            num_warps=1,
            num_stages=1,
            TILE_COLS=merge_cols,
            **constants,
        )
    return list(first[:1] if next_norm is None else first)
