"""The warpgroups of the Mosaic kernel that compute attention: both products, softmax, output."""

from __future__ import annotations

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from nanovllm_kernels._mosaic import CONSUMER_ROWS, ROW_ALIGNMENT, weigh
from nanovllm_kernels.ragged_prefill.mosaic_device import (
    KernelShape,
    Shared,
    Tile,
    for_each_tile,
    head_and_row,
    kv_tiles,
)


def consume(work: Any, out: Any, shared: Shared, shape: KernelShape, consumer: Any) -> None:
    """Attention of one consumer's rows of all tiles of this program."""
    tile_tokens, head_dim = shape.launch.tile_tokens, shape.head_dim
    rows_layout = plgpu.Layout.WGMMA.reduce(1)

    def visit(tile: Tile, first_step: Any) -> Any:
        steps = kv_tiles(tile, shape)
        head, row = head_and_row(tile, consumer, shape)
        position = tile.position + row
        # The second consumer is half a step behind the first, from the first product of a tile to the last. Tiles
        # without keys, the padding, pass no barrier at all.
        pl.when(steps > 0)(lambda: plgpu.barrier_wait(shared.q_ready))
        pl.when((steps > 0) & (consumer == 1))(lambda: _take_turns(shared))
        state = (
            plgpu.layout_cast(jnp.zeros((CONSUMER_ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((CONSUMER_ROWS,), -jnp.inf, jnp.float32), rows_layout),
            plgpu.layout_cast(jnp.zeros((CONSUMER_ROWS,), jnp.float32), rows_layout),
        )
        unmasked = jnp.minimum(lax.div(jnp.maximum(position + 1, 0), tile_tokens), steps)

        def attend(index: Any, state: Any, position: Any = None) -> Any:
            return _attend(index, first_step, steps, state, position, shared, shape, consumer)

        state = lax.fori_loop(0, unmasked, attend, state)
        acc, _, total = lax.fori_loop(unmasked, steps, functools.partial(attend, position=position), state)
        pl.when((steps > 0) & (consumer == 0))(lambda: plgpu.barrier_arrive(shared.turn))
        inverse = 1 / jnp.where(total > 0, total, jnp.ones_like(total))
        result = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(shape.dtype)
        _store(result, out, tile, row, head, shared, consumer)
        pl.when((steps > 0) & (consumer == 0))(lambda: plgpu.barrier_wait(shared.turn))
        return first_step + steps

    for_each_tile(work, shape, visit)
    plgpu.wait_smem_to_gmem(0)


def _take_turns(shared: Shared) -> None:
    plgpu.barrier_arrive(shared.turn)
    plgpu.barrier_wait(shared.turn)


def _attend(
    index: Any,
    first_step: Any,
    steps: Any,
    state: Any,
    position: Any,
    shared: Shared,
    shape: KernelShape,
    consumer: Any,
) -> Any:
    """Folds a tile of K and V into the softmax; `position`, if any, is that of row 0 and says to mask.

    Both consumers pass `turn` twice a tile: after issuing the first product, and between softmax and second
    product. Their passes pair up crosswise, so one computes its softmax while the other multiplies.
    """
    acc, maximum, total = state
    tile_tokens = shape.launch.tile_tokens
    stage = lax.rem(first_step + index, shape.launch.stages)
    plgpu.barrier_wait(shared.k_ready.at[stage])

    def multiply_keys(scores: Any) -> Array:
        plgpu.wgmma(scores, shared.q.at[consumer], shared.k.at[stage].transpose((1, 0)))
        _take_turns(shared)
        return scores[...]

    scores = pl.run_scoped(multiply_keys, plgpu.WGMMAAccumulatorRef((CONSUMER_ROWS, tile_tokens), jnp.float32))
    plgpu.barrier_arrive(shared.k_free.at[stage])
    pl.when(index == steps - 1)(lambda: plgpu.barrier_arrive(shared.q_free))
    if position is not None:
        rows = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
        columns = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        # A select: what a masked key left may be NaN.
        scores = jnp.where(columns + index * tile_tokens <= rows + position, scores, -jnp.inf)

    # A row that sees nothing gets NaN here; only rows that belong to nobody are such, and they are not stored.
    (acc, new_maximum, total), weights = weigh(acc, maximum, total, scores, shape.scale)
    operand = weights.astype(shape.dtype)
    # All of it before the turn goes to the other consumer, or the compiler moves it past the barrier.
    acc, new_maximum, total, operand = lax.optimization_barrier((acc, new_maximum, total, operand))
    plgpu.barrier_arrive(shared.turn)
    plgpu.barrier_wait(shared.v_ready.at[stage])
    plgpu.barrier_wait(shared.turn)
    if shape.interpreted:  # the interpreter knows wgmma on two references only
        acc = acc + jnp.dot(operand, shared.v[stage], preferred_element_type=jnp.float32)
    else:
        acc = pl.run_state(lambda acc: plgpu.wgmma(acc, operand, shared.v.at[stage]))(
            plgpu.WGMMAAccumulatorRef.init(acc)
        )
    plgpu.barrier_arrive(shared.v_free.at[stage])
    return acc, new_maximum, total


def _store(result: Any, out: Any, tile: Tile, row: Any, head: Any, shared: Shared, consumer: Any) -> None:
    """Writes the rows of a consumer that belong to the tile's sequence, [64, D]."""
    first = jnp.maximum(tile.first - row, 0)
    last = jnp.minimum(tile.last - row, CONSUMER_ROWS)
    start = tile.row + row
    whole = (first == 0) & (last == CONSUMER_ROWS)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before

    @pl.when(whole)
    def _() -> None:
        shared.out[consumer] = result
        plgpu.commit_smem()
        aligned = pl.multiple_of(start, ROW_ALIGNMENT)
        plgpu.copy_smem_to_gmem(shared.out.at[consumer], out.at[pl.ds(aligned, CONSUMER_ROWS), head])

    @pl.when(jnp.logical_not(whole))
    def _() -> None:
        shared.out_rows[consumer] = result
        plgpu.commit_smem()
        # TMA copies a fixed number of rows: one copy a power of 2 in their number.
        count, offset = jnp.maximum(last - first, 0), first
        for size in (32, 16, 8, 4, 2, 1):

            @pl.when((count & size) != 0)
            def _(size: int = size, offset: Any = offset) -> None:
                source = shared.out_rows.at[consumer, pl.ds(offset, size)]
                plgpu.copy_smem_to_gmem(source, out.at[pl.ds(start + offset, size), head])

            offset = offset + (count & size)
