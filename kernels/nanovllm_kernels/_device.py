"""Triton device functions and launch arithmetic that the attention kernels share.

Device functions are marked `no_type_check`: a wrapper put around them by a type checker's import hook would
hide their globals from Triton's compiler.
"""

# ruff: noqa: ANN001 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from nanovllm_kernels._fp8 import FP8, FP8_MAX

LOG2_E = tl.constexpr(1.4426950408889634)
_FP8_MAX = tl.constexpr(FP8_MAX)


def dot_dtype(q_dtype: np.dtype, cache_dtype: np.dtype) -> tl.dtype:
    """The dtype that both sides of a product are cast to.

    The one that holds both exactly; with a float8 cache float16 rather than bfloat16, since a GPU turns e4m3 into
    float16 in one instruction, and q, whose entries are far below 65504, gains precision.
    """
    if cache_dtype == FP8:
        return tl.float32 if q_dtype == jnp.float32 else tl.float16
    dtype = jnp.promote_types(q_dtype, cache_dtype)
    return {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}[dtype.name]


def dot_itemsize(q_dtype: np.dtype, cache_dtype: np.dtype) -> int:
    """Bytes an element of `dot_dtype`."""
    return 4 if dot_dtype(q_dtype, cache_dtype) is tl.float32 else 2


@triton.jit
@no_type_check
def offsets_in_blocks(blocks, positions, num_kv_heads, kv_head, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Element offset into the cache of positions of one KV head that lie in `blocks`.

    64 bits wide, since a cache may hold more than 2^31 elements. Its rows of D are fewer (`check_cache`) and counted
    in 32 bits, which saves a seventh of the instructions of float8's decode loop.
    """
    rows = (blocks * num_kv_heads + kv_head) * BLOCK_SIZE + positions % BLOCK_SIZE
    return rows.to(tl.int64) * HEAD_DIM


@triton.jit
@no_type_check
def slot_offsets(
    table_ptr,
    positions,
    visible,
    num_kv_heads,
    kv_head,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`offsets_in_blocks` of positions of one sequence, whose row of the block table is given."""
    if MASKED:
        blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=visible, other=0)
    else:
        blocks = tl.load(table_ptr + positions // BLOCK_SIZE)
    return offsets_in_blocks(blocks, positions, num_kv_heads, kv_head, BLOCK_SIZE, HEAD_DIM)


@triton.jit
@no_type_check
def load_rows(ptr, row_offsets, dims, row_mask, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows of D elements as a tile [rows, dims], zero where masked: what is masked is never read.

    dims may be padded past HEAD_DIM to a power of two.
    """
    pointers = ptr + row_offsets[:, None] + dims[None, :]
    if MASKED:
        tile = tl.load(pointers, mask=row_mask[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)
    elif dims.shape[0] != HEAD_DIM:
        tile = tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
@no_type_check
def scale_scores(scores, k_scale, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """Products of queries and keys times `k_scale`, capped if SOFT_CAP > 0, in units of log2."""
    if SOFT_CAP > 0:
        x = scores * (k_scale * (SCALE / SOFT_CAP))
        # tanh from exp2 loses its low digits near 0, where 1 - 2 / (1 + e^2x) cancels: a series there.
        square = x * x
        series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
        exact = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))
        scores = tl.where(tl.abs(x) < 0.25, series, exact) * (SOFT_CAP * LOG2_E)
    else:
        scores = scores * (k_scale * (SCALE * LOG2_E))
    return scores


@triton.jit
@no_type_check
def softmax_weights(scores, maximum):
    """Weights of a tile of scores, what the sums before it decay by, and the running maximum after it."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen no token keeps -inf, and -inf - -inf is NaN.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(maximum - shift)
    return weights, decay, new_maximum


@triton.jit
@no_type_check
def load_scale(ptr, kv_head, SCALED: tl.constexpr):
    """A KV head's scale in a float8 cache; 1 where there are no scales."""
    scale = 1.0
    if SCALED:
        scale = tl.load(ptr + kv_head).to(tl.float32)
    return scale


@triton.jit
@no_type_check
def to_cache(x, cache_ptr, scale):
    """`x` as the cache holds it: cast, and for float8 divided by `scale` and saturated."""
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    if dtype == tl.float8e4nv:
        wide = x.to(tl.float32) / scale
        x = tl.minimum(tl.maximum(wide, -_FP8_MAX), _FP8_MAX)
    return x.to(dtype)
