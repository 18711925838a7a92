"""The warpgroup of the Mosaic kernel that fetches queries, keys and values."""

from __future__ import annotations

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from nanovllm_kernels._mosaic import CONSUMER_ROWS, CONSUMERS, ROW_ALIGNMENT
from nanovllm_kernels.ragged_prefill.mosaic_device import (
    KernelShape,
    Shared,
    Tile,
    for_each_tile,
    head_and_row,
    kv_tiles,
)

_WARPS = 4  # of a warpgroup


def produce(work: Any, tables: Any, q: Any, k_cache: Any, v_cache: Any, shared: Shared, shape: KernelShape) -> None:
    """Fetches queries, keys and values of all tiles of this program."""
    stages, tile_tokens, block_size = shape.launch.stages, shape.launch.tile_tokens, shape.block_size
    nowhere = shape.num_blocks * shape.num_kv_heads  # past the end: TMA writes zeros

    def acquire(free: Any, step: Any) -> None:
        """Waits until what the ring held `stages` steps ago has been consumed."""
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[lax.rem(step, stages)]))

    def fetch_queries(tile: Tile) -> None:
        for consumer in range(CONSUMERS):
            head, row = head_and_row(tile, consumer, shape)
            source = q.at[pl.ds(pl.multiple_of(tile.row + row, ROW_ALIGNMENT), CONSUMER_ROWS), head]
            plgpu.copy_gmem_to_smem(source, shared.q.at[consumer], shared.q_ready)

    def pages_of(tile: Tile, index: Any, first: Any, count: int) -> tuple[Any, ...]:
        """Where `count` blocks of a tile of K and V lie, from its block `first` on."""
        kv_head = lax.div(tile.unit * shape.heads_a_program, shape.group)
        pages = []
        for block in range(count):
            column = index * shape.tile_blocks + first + block
            page = tables[tile.seq, jnp.minimum(column, shape.table_width - 1)] * shape.num_kv_heads + kv_head
            pages.append(lax.select(column * block_size < tile.keys, page, nowhere))
        return tuple(pages)

    def copy_pages(cache: Any, pages: tuple[Any, ...], first: Any, destination: Any, barrier: Any) -> None:
        for block, page in enumerate(pages):
            rows = pl.ds((first + block) * block_size, block_size)
            plgpu.copy_gmem_to_smem(cache.at[page], destination.at[rows], barrier)

    def fetch_whole(tile: Tile, first_step: Any, steps: Any, warp: Any) -> None:
        """A warp's blocks of all tiles of K and V whose slots may all be read.

        To issue a copy takes a thread some 40 instructions, most of them one after the other: a single warp was 6%
        slower with 16-token blocks. Pages are looked up a step ahead.
        """
        count = max(1, shape.tile_blocks // _WARPS)
        first = warp * count
        has_blocks = first < shape.tile_blocks

        def fetch(index: Any, pages: tuple[Any, ...]) -> tuple[Any, ...]:
            step = first_step + index
            stage = lax.rem(step, stages)
            following = pages_of(tile, index + 1, first, count)
            for cache, ring, ready, free in (
                (k_cache, shared.k, shared.k_ready, shared.k_free),
                (v_cache, shared.v, shared.v_ready, shared.v_free),
            ):
                acquire(free, step)
                copy = functools.partial(copy_pages, cache, pages, first, ring.at[stage], ready.at[stage])
                pl.when(has_blocks)(copy)
            return following

        lax.fori_loop(0, steps, fetch, pages_of(tile, 0, first, count))

    def fetch_tail(tile: Tile, first_step: Any, index: Any) -> None:
        """The tile of K and V in which the context ends inside a page: value slots past it are cleared.

        They may hold NaN, and a weight of zero does not get rid of NaN. Keys need no such care: their scores
        are masked.
        """
        step = first_step + index
        stage, pages = lax.rem(step, stages), pages_of(tile, index, 0, shape.tile_blocks)
        acquire(shared.k_free, step)
        copy_pages(k_cache, pages, 0, shared.k.at[stage], shared.k_ready.at[stage])
        acquire(shared.v_free, step)
        values, valid = shared.v.at[stage], tile.context - index * tile_tokens
        copy_pages(v_cache, pages, 0, values, shared.tail_ready)
        plgpu.barrier_wait(shared.tail_ready)
        for start in range(0, tile_tokens, CONSUMER_ROWS):
            pl.when(start + CONSUMER_ROWS > valid)(
                functools.partial(_clear_rows, values.at[pl.ds(start, CONSUMER_ROWS)], valid - start)
            )
        plgpu.commit_smem()
        for _ in pages:
            plgpu.barrier_arrive(shared.v_ready.at[stage])

    def visit(tile: Tile, first_step: Any) -> Any:
        steps = kv_tiles(tile, shape)
        pl.when((steps > 0) & (first_step > 0))(lambda: plgpu.barrier_wait(shared.q_free))
        pl.when(steps > 0)(lambda: fetch_queries(tile))
        has_tail = (steps * tile_tokens > tile.context) & (lax.rem(tile.context, block_size) != 0)
        whole = lax.select(has_tail, steps - 1, steps)
        plgpu.warp_map(functools.partial(fetch_whole, tile, first_step, whole))
        pl.when(has_tail)(lambda: fetch_tail(tile, first_step, whole))
        return first_step + steps

    steps = for_each_tile(work, shape, visit)
    # Nothing is left unobserved: a barrier must not be taken down under an arrival to come.
    pl.when(steps > 0)(lambda: plgpu.barrier_wait(shared.q_free))
    for ahead in range(stages):
        acquire(shared.k_free, steps + ahead)
        acquire(shared.v_free, steps + ahead)


def _clear_rows(values: Any, valid: Any) -> None:
    """Sets rows of `values` [64, D] from `valid` on to zero."""
    loaded = plgpu.load(values, layout=plgpu.Layout.WGMMA, optimized=False)
    index = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
    values[...] = jnp.where(index < valid, loaded, jnp.zeros_like(loaded))
