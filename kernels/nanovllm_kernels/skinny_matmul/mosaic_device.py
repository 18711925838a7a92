"""Device code of the Mosaic implementation: a program computes one tile of the output.

Its producer warpgroup fills a ring of tiles of x and w by TMA. Two consumer warpgroups share the tile out: 64 rows
each, or, of up to 64 rows, every other stage of the ring, whose sums are added at the end.

Wgmma takes 64 rows. Of a tile that has fewer, the rest is what lies behind it in shared memory, and its sums are not
stored: rows of the product do not touch each other, and to fetch zeros instead costs as much as to fetch x.

As in the Triton kernel, (x * norm) @ w is scaled by the row's 1 / rms at the end. x * norm is formed in registers, from
where wgmma takes its left side. What comes as this product is taken from shared memory, unless tiles are narrow.

Where tiles are fewer than half the multiprocessors, K may be split over the programs of a cluster, each of which
finishes a part of the tile's columns.

Refs and scalars of a kernel have no Python type that says more than Any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from nanovllm_kernels._mosaic import CONSUMER_ROWS, CONSUMERS
from nanovllm_kernels.skinny_matmul.mosaic_cluster import collect_columns, leave_halves, send_columns
from nanovllm_kernels.skinny_matmul.mosaic_finish import COL_LAYOUT, ROW_LAYOUT, finish, given_squares
from nanovllm_kernels.skinny_matmul.mosaic_shape import ProductShape


@dataclass(frozen=True)
class Place:
    """A program's tile, by its first row and the number of its columns, and the program's number in its cluster."""

    first_row: Any
    col: Any
    split: Any

    def own_col(self, shape: ProductShape) -> Any:
        """Among all parts of columns that programs finish, the number of this program's."""
        return self.col * shape.tiling.splits + self.split


def produce(x: Any, w: Any, others: Any, scratch: Any, shape: ProductShape, place: Place) -> None:
    """Fetches everything that the program reads."""
    tile, rows = shape.tiling, pl.ds(place.first_row, shape.tiling.tile_rows)
    own_cols = pl.ds(place.own_col(shape) * shape.own_cols, shape.own_cols)
    if shape.norm:
        plgpu.copy_gmem_to_smem(others["norm"], scratch["norm"], scratch["norm_ready"])

    def fetch(step: Any, stage: Any) -> Any:
        pl.when(step >= tile.num_stages)(lambda: plgpu.barrier_wait(scratch["free"].at[stage]))
        inputs = pl.ds((place.split * shape.steps + step) * tile.tile_inputs, tile.tile_inputs)
        ready = scratch["ready"].at[stage]
        for into, columns in zip(scratch["w"], shape.piece_columns(place.col, tile.tile_cols), strict=True):
            cols = pl.ds(*columns)
            for part in range(shape.parts):
                source = w.at[inputs, part, cols] if shape.gated else w.at[inputs, cols]
                plgpu.copy_gmem_to_smem(source, into.at[stage, part], ready)
        into = scratch["x"].at[pl.ds(stage * tile.tile_rows, tile.tile_rows)]
        plgpu.copy_gmem_to_smem(x.at[rows, inputs], into, ready)
        return jnp.where(stage + 1 == tile.num_stages, 0, stage + 1)

    lax.fori_loop(0, shape.steps, fetch, jnp.int32(0))
    if shape.bias:
        for part in range(shape.parts):
            plgpu.copy_gmem_to_smem(others["bias"].at[part, own_cols], scratch["bias"].at[part], scratch["bias_ready"])
    if shape.residual:
        into = scratch["out"][0].at[pl.ds(0, tile.tile_rows)]
        plgpu.copy_gmem_to_smem(others["residual"].at[rows, own_cols], into, scratch["residual_ready"])
    if shape.next_norm:
        plgpu.copy_gmem_to_smem(others["next_norm"].at[own_cols], scratch["next_norm"], scratch["next_norm_ready"])
    # Nothing is left unobserved: a barrier must not be taken down under an arrival to come.
    for stage in range(min(tile.num_stages, shape.steps)):
        plgpu.barrier_wait(scratch["free"].at[stage])


def consume(outs: Any, others: Any, scratch: Any, shape: ProductShape, consumer: Any, place: Place) -> None:
    """One consumer's part of the tile: half of its rows, or, of up to 64 rows, the sums over half of the inputs."""
    accumulators = [
        plgpu.WGMMAAccumulatorRef((CONSUMER_ROWS, cols), jnp.float32)
        for cols in shape.pieces
        for _ in range(shape.parts)
    ]
    row = 0 if shape.tiling.splits_inputs else consumer * CONSUMER_ROWS
    first_row, col = place.first_row, place.own_col(shape)
    steps = shape.steps // CONSUMERS if shape.tiling.splits_inputs else shape.steps
    # Asked for before anything is there to be multiplied.
    given = given_squares(others["squares"], shape, first_row + row) if shape.square_parts else None

    def accumulate(*accs: Any) -> tuple[list[Array], Any]:
        squares = (_multiply_from_registers if shape.x_in_registers else _multiply)(
            accs, scratch, shape, consumer, steps
        )
        return [acc[...] for acc in accs], squares

    sums, squares = pl.run_scoped(accumulate, *accumulators)
    if shape.tiling.splits > 1:
        (own_sums,) = sums

        def collect() -> None:
            totals = collect_columns(own_sums, scratch, shape, consumer)
            finish([totals], given, outs, scratch, shape, row, first_row + row, col)

        if shape.tiling.splits_inputs:
            leave_halves(own_sums, scratch, shape, consumer)
            pl.when(consumer == 1)(lambda: send_columns(own_sums, scratch, shape, consumer))
            pl.when(consumer == 0)(collect)
        else:
            send_columns(own_sums, scratch, shape, consumer)
            collect()
        return
    if not shape.tiling.splits_inputs:
        finish(sums, squares if shape.norm else given, outs, scratch, shape, row, first_row + row, col)
        return

    @pl.when(consumer == 1)
    def _() -> None:
        for into, own in zip(_sums_of(scratch, shape), sums, strict=True):
            into[...] = own
        if shape.norm:
            scratch["squares"][...] = squares
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["sums_ready"])

    @pl.when(consumer == 0)
    def _() -> None:
        plgpu.barrier_wait(scratch["sums_ready"])
        theirs = [plgpu.load(each, layout=plgpu.Layout.WGMMA) for each in _sums_of(scratch, shape)]
        totals = [own + other for own, other in zip(sums, theirs, strict=True)]
        total_squares = given
        if shape.norm:
            total_squares = squares + plgpu.load(scratch["squares"], layout=ROW_LAYOUT, optimized=False)
        finish(totals, total_squares, outs, scratch, shape, 0, first_row, col)


def _w_tiles(scratch: Any, shape: ProductShape, stage: Any) -> list[Any]:
    """A stage's tiles of w, in the order of the accumulators: those of a piece of the columns follow each other."""
    return [piece.at[stage, part] for piece in scratch["w"] for part in range(shape.parts)]


def _sums_of(scratch: Any, shape: ProductShape) -> list[Any]:
    """Where one consumer leaves its sums to the other, in the same order."""
    return [piece.at[part] for piece in scratch["sums"] for part in range(shape.parts)]


def _x_tile(scratch: Any, shape: ProductShape, stage: Any, consumer: Any) -> Any:
    """The 64 rows of a stage that a consumer multiplies."""
    first = 0 if shape.tiling.splits_inputs else consumer * CONSUMER_ROWS
    return scratch["x"].at[pl.ds(stage * shape.tiling.tile_rows + first, CONSUMER_ROWS)]


def _next_stage(stage: Any, shape: ProductShape) -> Any:
    """The stage of a consumer's next step; a remainder would cost a third of the step."""
    later = stage + (CONSUMERS if shape.tiling.splits_inputs else 1)
    return jnp.where(later >= shape.tiling.num_stages, later - shape.tiling.num_stages, later)


def _first_stage(shape: ProductShape, consumer: Any) -> Any:
    return consumer if shape.tiling.splits_inputs else jnp.int32(0)


def _multiply(accs: Any, scratch: Any, shape: ProductShape, consumer: Any, steps: Any) -> None:
    """The product from shared memory; a stage is handed back when the product after it is under way."""

    def step(index: Any, stages: Any) -> Any:
        stage, before = stages
        plgpu.barrier_wait(scratch["ready"].at[stage])
        for acc, w in zip(accs, _w_tiles(scratch, shape, stage), strict=True):
            plgpu.wgmma(acc, _x_tile(scratch, shape, stage, consumer), w)
        plgpu.wgmma_wait(len(accs))
        pl.when(index > 0)(lambda: plgpu.barrier_arrive(scratch["free"].at[before]))
        return _next_stage(stage, shape), stage

    first = _first_stage(shape, consumer)
    _, last = lax.fori_loop(0, steps, step, (first, first))
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(scratch["free"].at[last])


def _multiply_from_registers(accs: Any, scratch: Any, shape: ProductShape, consumer: Any, steps: Any) -> Any:
    """The product with x from registers; with a norm it is x * norm, and x's sums of squares are returned.

    With a norm, squares are added up by element while a step's product runs, and over a row at the end, as threads
    have to exchange for that. The next step's x is fetched meanwhile, too, if a consumer has three stages or more
    (Qwen3-8B's qkv, 64 rows on an H200: 15.1 us, and 17.6 with squares over rows and x fetched later); with two, a
    stage is handed back before the next one is waited for (its gate_up: 49.3 for 51.3). Without a norm always so: x
    itself is what wgmma reads, and ptxas runs wgmma one by one if that is written while another is under way.
    """
    stride = CONSUMERS if shape.tiling.splits_inputs else 1
    one_ahead = shape.norm and shape.tiling.num_stages > 2 * stride
    if shape.norm:
        plgpu.barrier_wait(scratch["norm_ready"])

    def fetch(position: Any, stage: Any) -> tuple[Array, Any]:
        plgpu.barrier_wait(scratch["ready"].at[stage])
        x = plgpu.load(_x_tile(scratch, shape, stage, consumer), layout=plgpu.Layout.WGMMA)
        if not shape.norm:
            return x, None
        return x, plgpu.load(scratch["norm"].at[position], layout=COL_LAYOUT, optimized=False)

    def multiply(x: Array, norm: Any, stage: Any, squares: Any) -> Any:
        operand = x * lax.broadcast_in_dim(norm, x.shape, [1]) if shape.norm else x
        if shape.interpreted:  # the interpreter knows wgmma on two references only
            own = min(CONSUMER_ROWS, shape.tiling.tile_rows)
            x_tile = _x_tile(scratch, shape, stage, consumer)
            x_tile.at[pl.ds(0, own)][...] = operand[:own]
            operand = x_tile
        for acc, w in zip(accs, _w_tiles(scratch, shape, stage), strict=True):
            plgpu.wgmma(acc, operand, w)
        if not shape.norm:
            return None
        wide = x.astype(jnp.float32)
        return squares + wide * wide

    def hand_back(stage: Any) -> None:
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(scratch["free"].at[stage])

    def step(_: Any, carry: Any) -> Any:
        x, norm, position, stage, squares = carry
        squares = multiply(x, norm, stage, squares)
        position, following = position + stride, _next_stage(stage, shape)
        if not one_ahead:
            hand_back(stage)
        x, norm = fetch(position, following)
        if one_ahead:
            hand_back(stage)
        return x, norm, position, following, squares

    first, squares = _first_stage(shape, consumer), None
    if shape.norm:
        squares = jnp.zeros((CONSUMER_ROWS, shape.tiling.tile_inputs), jnp.float32)
        squares = plgpu.layout_cast(squares, plgpu.Layout.WGMMA)
    carry = (*fetch(first, first), first, first, squares)
    x, norm, _, stage, squares = lax.fori_loop(0, steps - 1, step, carry)
    squares = multiply(x, norm, stage, squares)
    hand_back(stage)
    return jnp.sum(squares, axis=1) if shape.norm else None
