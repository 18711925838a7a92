"""The warpgroup of the Mosaic kernel that norms and rotates queries and newest keys, and writes the cache."""

from __future__ import annotations

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from nanovllm_kernels._mosaic import CONSUMERS
from nanovllm_kernels.rope_paged_decode.mosaic_shape import (
    AREA,
    Arrays,
    KernelShape,
    Shared,
    page_of,
    piece_at,
    rounds_of,
)

_LAYOUT = plgpu.Layout.WGMMA
_DIMS = _LAYOUT.reduce(1)  # of a vector that is the same for all heads


def make_queries(arrays: Arrays, shared: Shared, shape: KernelShape) -> None:
    """For both consumers in turn, one piece ahead of them."""
    half = shape.head_dim // 2
    halves = [pl.ds(part * half, half) for part in range(2)]
    load = functools.partial(plgpu.load, layout=_DIMS, optimized=False)
    norms = [[load(norm.at[part]).astype(jnp.float32) for part in halves] for norm in arrays.norms]

    def make(ordinal: Any, consumer: int) -> None:
        piece = piece_at(arrays, ordinal, consumer, shape)
        heads = shared.heads.at[pl.ds(consumer * AREA, AREA)]
        pl.when(ordinal > 0)(lambda: plgpu.barrier_wait(shared.heads_free.at[consumer]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        source = arrays.qkv.at[piece.row, piece.head]
        plgpu.copy_gmem_to_smem(source, heads.at[pl.ds(0, shape.group + 2)], shared.raw_ready.at[consumer])
        newest = jnp.maximum(piece.context - 1, 0)
        page = page_of(arrays, piece, lax.div(newest, shape.block_size), shape)
        angles = load(arrays.cos.at[piece.row]), load(arrays.sin.at[piece.row])
        plgpu.barrier_wait(shared.raw_ready.at[consumer])
        _turn([heads.at[:, part].transpose((1, 0)) for part in halves], norms, *angles, shape)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.heads_ready.at[consumer])

        @pl.when(piece.has_newest)
        def _() -> None:
            slot = pl.ds(lax.rem(newest, shape.block_size), 1)
            for offset, cache in enumerate((arrays.k_cache, arrays.v_cache)):
                plgpu.copy_smem_to_gmem(heads.at[pl.ds(shape.group + offset, 1)], cache.at[page, slot])

    rounds = [rounds_of(arrays, consumer, shape) for consumer in range(CONSUMERS)]

    def turn(ordinal: Any, carry: Any) -> Any:
        for consumer in range(CONSUMERS):
            pl.when(ordinal < rounds[consumer])(functools.partial(make, ordinal, consumer))
        return carry

    lax.fori_loop(0, functools.reduce(jnp.maximum, rounds), turn, jnp.int32(0))
    for consumer in range(CONSUMERS):
        pl.when(rounds[consumer] > 0)(functools.partial(plgpu.barrier_wait, shared.heads_free.at[consumer]))
    plgpu.wait_smem_to_gmem(0)


def _turn(parts: list[Any], norms: list[list[Any]], cos: Any, sin: Any, shape: KernelShape) -> None:
    """Norms and rotates queries and key in place; `parts` are [D / 2, 8 heads] each, the value among them."""
    size = (shape.head_dim // 2, AREA)

    def spread(dims: Any) -> Any:
        return lax.broadcast_in_dim(dims, size, [0])

    def rounded(x: Any) -> Any:
        return x.astype(shape.dtype).astype(jnp.float32)

    head = plgpu.broadcasted_iota(jnp.int32, size, 1, layout=_LAYOUT)
    raw = [plgpu.load(part, layout=_LAYOUT, optimized=False) for part in parts]
    x = [each.astype(jnp.float32) for each in raw]
    if norms:
        squares = jnp.sum(x[0] * x[0] + x[1] * x[1], axis=0)
        factor = lax.rsqrt(squares * (1 / shape.head_dim) + shape.eps)
        factor = lax.broadcast_in_dim(factor, size, [1])
        weights = [jnp.where(head < shape.group, spread(q), spread(k)) for q, k in zip(*norms, strict=True)]
        x = [rounded(rounded(each * factor) * weight) for each, weight in zip(x, weights, strict=True)]
    cos, sin = spread(cos), spread(sin)
    turned = [x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin]
    for part, was, now in zip(parts, raw, turned, strict=True):
        part[...] = jnp.where(head == shape.group + 1, was, now.astype(shape.dtype))
