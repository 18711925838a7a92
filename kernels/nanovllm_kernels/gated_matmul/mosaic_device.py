"""Device code of the Mosaic implementation: a persistent product, whose programs go from tile to tile of the output.

Of the three warpgroups of a program one fetches tiles of x and w by TMA into a ring of stages; two consumers multiply
64 rows of each. They are a few stages apart, so that one has the tensor cores while the other finishes its rows of a
tile.

Refs and scalars of a kernel have no Python type that says more than Any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from nanovllm_kernels._integers import ceil_div
from nanovllm_kernels._mosaic import CONSUMER_ROWS, CONSUMERS, ROW_ALIGNMENT

TILE_ROWS = CONSUMERS * CONSUMER_ROWS
PARTS, TILE_COLS = 2, 128  # gate and up, and columns of each in a tile


@dataclass(frozen=True)
class Tiling:
    """Launch parameters.

    Attributes:
        tile_inputs: of K, a stage.
        num_stages: of the ring.
        head_start: stages that the first consumer is ahead of the second.
        group: row tiles that are taken together, column by column, while their x is in L2.

    Raises:
        ValueError: if the ring has no room for the head start; the kernel would wait for ever.
    """

    tile_inputs: int = 64
    num_stages: int = 4
    head_start: int = 3
    group: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.head_start < self.num_stages:
            raise ValueError(
                f"head_start is {self.head_start}; with {self.num_stages} stages it must be 1 to one less."
            )


DEFAULT_TILING = Tiling()


@dataclass(frozen=True)
class ProductShape:
    """What the kernel is compiled for."""

    num_rows: int
    num_inputs: int
    num_cols: int  # of gate, and of up
    dtype: Any
    tiling: Tiling
    programs: int

    @property
    def steps(self) -> int:
        """Stages that a tile takes."""
        return self.num_inputs // self.tiling.tile_inputs

    @property
    def row_tiles(self) -> int:
        return ceil_div(self.num_rows, TILE_ROWS)

    @property
    def col_tiles(self) -> int:
        return self.num_cols // TILE_COLS


def for_each_tile(shape: ProductShape, visit: Callable[[Any, Any, Any], None]) -> None:
    """Calls `visit(ordinal, first_row, col_tile)` for each tile of this program."""
    tile, cols = shape.tiling, shape.col_tiles
    index = lax.axis_index("program")
    count = lax.div(shape.row_tiles * cols - index + (shape.programs - 1), shape.programs)

    def step(ordinal: Any, _: None) -> None:
        place = ordinal * shape.programs + index
        group = lax.div(place, tile.group * cols)
        within = place - group * (tile.group * cols)
        height = jnp.minimum(tile.group, shape.row_tiles - group * tile.group)
        col = lax.div(within, height)
        visit(ordinal, (group * tile.group + within - col * height) * TILE_ROWS, col)

    lax.fori_loop(0, count, step, None)


def produce(shape: ProductShape, shared: Any, x: Any, w: Any) -> None:
    """Fills the ring, for all tiles of the program."""
    tile = shape.tiling

    def visit(ordinal: Any, first_row: Any, col: Any) -> None:
        def fetch(index: Any, _: None) -> None:
            for stage in range(tile.num_stages):
                used = (ordinal > 0) | (index > 0)
                pl.when(used)(lambda stage=stage: plgpu.barrier_wait(shared["free"].at[stage]))
                inputs, ready = index * tile.num_stages + stage, shared["ready"].at[stage]
                inputs = pl.ds(inputs * tile.tile_inputs, tile.tile_inputs)
                for part in range(PARTS):
                    columns = w.at[inputs, part, pl.ds(col * TILE_COLS, TILE_COLS)]
                    plgpu.copy_gmem_to_smem(columns, shared["w"].at[stage, part], ready)
                plgpu.copy_gmem_to_smem(x.at[pl.ds(first_row, TILE_ROWS), inputs], shared["x"].at[stage], ready)

        lax.fori_loop(0, shape.steps // tile.num_stages, fetch, None)

    for_each_tile(shape, visit)
    for stage in range(tile.num_stages):  # nothing arrives at a program that has ended
        plgpu.barrier_wait(shared["free"].at[stage])


def consume(shape: ProductShape, shared: Any, consumer: Any, finish: Callable[[Any, Any, Any], None]) -> None:
    """Multiplies this consumer's rows of all tiles; `finish(sums, first_row, col_tile)` takes gate and up."""
    tile = shape.tiling
    rows = pl.ds(consumer * CONSUMER_ROWS, CONSUMER_ROWS)

    def visit(ordinal: Any, first_row: Any, col: Any) -> None:
        def accumulate(*sums: Any) -> list[Array]:
            def step(index: Any, _: None) -> None:
                for stage in range(tile.num_stages):
                    if stage == tile.head_start:
                        first = (consumer == 0) & (ordinal == 0) & (index == 0)
                        pl.when(first)(lambda: plgpu.barrier_arrive(shared["started"]))
                    plgpu.barrier_wait(shared["ready"].at[stage])
                    for part, its_sums in enumerate(sums):
                        plgpu.wgmma(its_sums, shared["x"].at[stage, rows], shared["w"].at[stage, part])
                    plgpu.wgmma_wait(len(sums))
                    before = shared["free"].at[(stage - 1) % tile.num_stages]
                    if stage == 0:
                        pl.when(index > 0)(lambda before=before: plgpu.barrier_arrive(before))
                    else:
                        plgpu.barrier_arrive(before)

            lax.fori_loop(0, shape.steps // tile.num_stages, step, None)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(shared["free"].at[tile.num_stages - 1])
            return [its_sums[...] for its_sums in sums]

        accumulator = plgpu.WGMMAAccumulatorRef((CONSUMER_ROWS, TILE_COLS), jnp.float32)
        sums = pl.run_scoped(accumulate, *[accumulator] * PARTS)
        finish(sums, first_row + consumer * CONSUMER_ROWS, col)

    pl.when(consumer == 1)(lambda: plgpu.barrier_wait(shared["started"]))
    for_each_tile(shape, visit)


def activated(gate: Float[Array, "R C"], up: Float[Array, "R C"]) -> Float[Array, "R C"]:
    """Two instructions of the special function unit for each element; a division would be ten others."""
    root = lax.rsqrt(1 + jnp.exp(-gate))
    return gate * (root * root) * up


def num_tiles(rows: int, outputs: int) -> int:
    """Of an output [rows, outputs]."""
    return ceil_div(rows, TILE_ROWS) * (outputs // TILE_COLS)


def fits(*, rows: int, inputs: int, outputs: int) -> bool:
    """Whether the kernel can compute such a product: whole tiles of columns and whole rounds of the ring."""
    tile = DEFAULT_TILING
    return rows % ROW_ALIGNMENT == 0 and inputs % (tile.tile_inputs * tile.num_stages) == 0 and outputs % TILE_COLS == 0
