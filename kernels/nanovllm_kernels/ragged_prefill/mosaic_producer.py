"""The warpgroup of the Mosaic kernel that fetches queries, keys and values."""

from __future__ import annotations

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from nanovllm_kernels.ragged_prefill.mosaic_device import (
    CONSUMERS,
    ROWS,
    KernelShape,
    Shared,
    Tile,
    for_each_tile,
    head_and_row,
    kv_tiles,
)
from nanovllm_kernels.ragged_prefill.worklist import ROW_ALIGNMENT

WARPS = 4


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
            source = q.at[pl.ds(pl.multiple_of(tile.row + row, ROW_ALIGNMENT), ROWS), head]
            plgpu.copy_gmem_to_smem(source, shared.q.at[consumer], shared.q_ready)

    def fetch_pages(cache: Any, pages: list[Any], destination: Any, barrier: Any) -> None:
        for block, page in enumerate(pages):
            plgpu.copy_gmem_to_smem(cache.at[page], destination.at[pl.ds(block * block_size, block_size)], barrier)

    def fetch_tail(pages: list[Any], values: Any, valid: Any, barrier: Any) -> None:
        """The tile in which the context ends inside a page: slots past it are cleared.

        They may hold NaN, and a weight of zero does not get rid of NaN. Keys need no such care: their scores
        are masked.
        """
        fetch_pages(v_cache, pages, values, shared.tail_ready)
        plgpu.barrier_wait(shared.tail_ready)
        for start in range(0, tile_tokens, ROWS):
            pl.when(start + ROWS > valid)(functools.partial(_clear_rows, values.at[pl.ds(start, ROWS)], valid - start))
        plgpu.commit_smem()
        for _ in pages:
            plgpu.barrier_arrive(barrier)

    def fetch_whole(tile: Tile, first_step: Any, steps: Any, kv_head: Any, warp: Any) -> None:
        """Pages without a tail, spread over the warps: to issue a copy takes one thread a hundred cycles and more."""
        warp_blocks = max(1, shape.tile_blocks // WARPS)
        first_block = warp * warp_blocks

        def pages_of(index: Any) -> tuple[Any, ...]:
            pages = []
            for block in range(warp_blocks):
                column = index * shape.tile_blocks + first_block + block
                page = tables[tile.seq, jnp.minimum(column, shape.table_width - 1)] * shape.num_kv_heads + kv_head
                pages.append(lax.select(column * block_size < tile.keys, page, nowhere))
            return tuple(pages)

        def copy(cache: Any, pages: tuple[Any, ...], destination: Any, barrier: Any) -> None:
            for block, page in enumerate(pages):
                start = (first_block + block) * block_size
                plgpu.copy_gmem_to_smem(cache.at[page], destination.at[pl.ds(start, block_size)], barrier)

        def fetch(index: Any, pages: tuple[Any, ...]) -> tuple[Any, ...]:
            step = first_step + index
            stage = lax.rem(step, stages)
            following = pages_of(index + 1)
            has_blocks = first_block < shape.tile_blocks
            acquire(shared.k_free, step)
            pl.when(has_blocks)(lambda: copy(k_cache, pages, shared.k.at[stage], shared.k_ready.at[stage]))
            acquire(shared.v_free, step)
            pl.when(has_blocks)(lambda: copy(v_cache, pages, shared.v.at[stage], shared.v_ready.at[stage]))
            return following

        lax.fori_loop(0, steps, fetch, pages_of(0))

    def visit(tile: Tile, first_step: Any) -> Any:
        steps = kv_tiles(tile, shape)
        pl.when((steps > 0) & (first_step > 0))(lambda: plgpu.barrier_wait(shared.q_free))
        pl.when(steps > 0)(lambda: fetch_queries(tile))
        kv_head = lax.div(tile.unit * shape.heads_a_program, shape.group)

        def fetch(index: Any, _: Any) -> None:
            step = first_step + index
            stage = lax.rem(step, stages)
            pages = []
            for block in range(shape.tile_blocks):
                position = index * tile_tokens + block * block_size
                column = jnp.minimum(index * shape.tile_blocks + block, shape.table_width - 1)
                page = tables[tile.seq, column] * shape.num_kv_heads + kv_head
                pages.append(lax.select(position < tile.keys, page, nowhere))
            acquire(shared.k_free, step)
            fetch_pages(k_cache, pages, shared.k.at[stage], shared.k_ready.at[stage])
            acquire(shared.v_free, step)
            valid = tile.context - index * tile_tokens
            is_tail = (valid < tile_tokens) & (lax.rem(tile.context, block_size) != 0)
            values, barrier = shared.v.at[stage], shared.v_ready.at[stage]
            pl.when(is_tail)(lambda: fetch_tail(pages, values, valid, barrier))
            pl.when(jnp.logical_not(is_tail))(lambda: fetch_pages(v_cache, pages, values, barrier))

        if not shape.launch.warps:
            lax.fori_loop(0, steps, fetch, None)
            return first_step + steps
        has_tail = (steps * tile_tokens > tile.context) & (lax.rem(tile.context, block_size) != 0)
        whole = lax.select(has_tail, steps - 1, steps)
        plgpu.warp_map(functools.partial(fetch_whole, tile, first_step, whole, kv_head))
        lax.fori_loop(whole, steps, fetch, None)
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
