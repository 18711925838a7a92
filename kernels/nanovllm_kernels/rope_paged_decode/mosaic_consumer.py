"""The warpgroups of the Mosaic kernel that attend: a piece of a row each, for the heads of a group.

Queries stay in registers: they are a few of the 64 rows that wgmma multiplies, and what the other rows hold is
multiplied like them and never stored.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from nanovllm_kernels._mosaic import CONSUMER_ROWS, LOG2_E, weigh
from nanovllm_kernels.rope_paged_decode.mosaic_merge import merge
from nanovllm_kernels.rope_paged_decode.mosaic_parts import arrive, leave_part, store_rows
from nanovllm_kernels.rope_paged_decode.mosaic_shape import AREA, Arrays, KernelShape, Piece, Shared, for_each_piece

_LAYOUT = plgpu.Layout.WGMMA
_COLUMNS, _ROWS = _LAYOUT.reduce(0), _LAYOUT.reduce(1)
State = tuple[Any, Any, Any]  # weighted values [64, D], maximum of log2 and sum of the weights [64]


def consume(arrays: Arrays, shared: Shared, shape: KernelShape, consumer: Any) -> None:
    """Attends this consumer's pieces."""
    stages, tile_tokens = shape.launch.stages, shape.launch.tile_tokens

    def visit(piece: Piece, step: Any) -> Any:
        tiles = piece.tiles(shape)
        queries, state = _begin(shared, shape, consumer, piece)

        def wait(tile: Any) -> Any:
            stage = consumer * stages + lax.rem(step + tile, stages)
            plgpu.barrier_wait(shared.ready.at[stage])
            return stage

        def release(tile: Any, stage: Any) -> None:
            plgpu.barrier_arrive(shared.free.at[stage])
            # Only now: what `_begin` read has been multiplied, so it has come. An arrival right after the reads may be
            # seen before the last of them is done, which then finds the next piece's value (seen on an H200).
            pl.when(tile == 0)(lambda: plgpu.barrier_arrive(shared.heads_free.at[consumer]))

        def attend(tile: Any, state: State) -> State:
            stage = wait(tile)
            state = _add(state, _scores(queries, shared, stage, shape), shared, stage, shape)
            release(tile, stage)
            return state

        state = lax.fori_loop(0, tiles - 1, attend, state)
        stage = wait(tiles - 1)
        valid = piece.keys - (tiles - 1) * tile_tokens
        _clear_values(shared.v.at[stage], valid, shape)
        scores = _scores(queries, shared, stage, shape)
        keys = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=_LAYOUT)
        state = _add(state, jnp.where(keys < valid, scores, -jnp.inf), shared, stage, shape)
        release(tiles - 1, stage)
        _finish(arrays, shared, shape, consumer, piece, state)
        return step + tiles

    for_each_piece(arrays, consumer, shape, visit, jnp.int32(0))


def _begin(shared: Shared, shape: KernelShape, consumer: Any, piece: Piece) -> tuple[list[Any], State]:
    """Queries in halves of D, and the softmax of the newest key and value alone where they are this piece's."""
    half = shape.head_dim // 2
    plgpu.barrier_wait(shared.heads_ready.at[consumer])
    heads = shared.heads.at[pl.ds(consumer * AREA, CONSUMER_ROWS)]

    def load(ref: Any, layout: Any) -> Any:
        return plgpu.load(ref, layout=layout, optimized=False)

    queries = [load(heads.at[:, pl.ds(part * half, half)], _LAYOUT) for part in range(2)]
    key = [load(heads.at[shape.group, pl.ds(part * half, half)], _COLUMNS).astype(jnp.float32) for part in range(2)]
    value = load(heads.at[shape.group + 1], _COLUMNS).astype(jnp.float32)
    score = sum(
        jnp.sum(part.astype(jnp.float32) * lax.broadcast_in_dim(other, part.shape, [1]), axis=1)
        for part, other in zip(queries, key, strict=True)
    )
    # A row without tokens begins like this too: its result is not a number and is not stored.
    present = piece.has_newest | (piece.context == 0)
    one = lax.select(present, jnp.float32(1), jnp.float32(0))
    least = lax.select(present, jnp.float32(0), -jnp.float32(jnp.inf))
    total = plgpu.layout_cast(lax.broadcast_in_dim(one, (CONSUMER_ROWS,), []), _ROWS)
    acc = lax.broadcast_in_dim(value * one, (CONSUMER_ROWS, shape.head_dim), [1])
    return queries, (acc, score * (shape.scale * LOG2_E) + least, total)


def _scores(queries: list[Any], shared: Shared, stage: Any, shape: KernelShape) -> Any:
    half = shape.head_dim // 2
    keys = [shared.k.at[stage, :, pl.ds(part * half, half)].transpose((1, 0)) for part in range(2)]
    if shape.interpreted:
        return sum(jnp.dot(q, k[...], preferred_element_type=jnp.float32) for q, k in zip(queries, keys, strict=True))

    def multiply(scores: Any) -> Any:
        for q, k in zip(queries, keys, strict=True):
            plgpu.wgmma(scores, q, k)
        return scores[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((CONSUMER_ROWS, shape.launch.tile_tokens), jnp.float32))


def _add(state: State, scores: Any, shared: Shared, stage: Any, shape: KernelShape) -> State:
    """One more tile; `scores` are queries times keys."""
    (acc, new_maximum, total), weights = weigh(*state, scores, shape.scale)
    operand = weights.astype(shape.dtype)
    if shape.interpreted:
        return acc + jnp.dot(operand, shared.v[stage], preferred_element_type=jnp.float32), new_maximum, total

    def multiply(acc: Any) -> None:
        plgpu.wgmma(acc, operand, shared.v.at[stage])

    return pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(acc)), new_maximum, total


def _clear_values(values: Any, valid: Any, shape: KernelShape) -> None:
    """Zeros for values past the `valid` ones: slots nobody owns may hold infinities, which no weight makes zero.

    Whole blocks past the end are zeros already.
    """

    @pl.when(lax.rem(valid, shape.block_size) != 0)
    def _() -> None:
        for start in range(0, shape.launch.tile_tokens, CONSUMER_ROWS):
            part = values.at[pl.ds(start, CONSUMER_ROWS)]
            loaded = plgpu.load(part, layout=_LAYOUT, optimized=False)
            token = plgpu.broadcasted_iota(jnp.int32, loaded.shape, 0, layout=_LAYOUT)
            part[...] = jnp.where(token + start < valid, loaded, jnp.zeros_like(loaded))
        plgpu.commit_smem()


def _finish(arrays: Arrays, shared: Shared, shape: KernelShape, consumer: Any, piece: Piece, state: State) -> None:
    acc, maximum, total = state
    result = acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])
    target = arrays.out.at[piece.row, pl.ds(piece.head * shape.group, shape.group)]

    @pl.when(piece.whole != 0)
    def _() -> None:
        row = plgpu.broadcasted_iota(jnp.int32, result.shape, 0, layout=_LAYOUT)
        stored = result.astype(shape.dtype)
        present = row < lax.select(piece.context > 0, CONSUMER_ROWS, 0)
        store_rows(target, jnp.where(present, stored, jnp.zeros_like(stored)), shape)

    @pl.when(piece.whole == 0)
    def _() -> None:
        leave_part(arrays, piece, result, maximum + jnp.log2(total), shape)
        before = arrive(arrays, piece, shared.arrived.at[pl.ds(consumer, 1)], shape)
        pl.when(before == piece.count - 1)(lambda: merge(arrays, piece, target, shape))
