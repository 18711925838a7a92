"""The warpgroup of the Mosaic kernel that copies keys and values."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from nanovllm_kernels._mosaic import CONSUMERS
from nanovllm_kernels.rope_paged_decode.mosaic_shape import (
    Arrays,
    KernelShape,
    Piece,
    Shared,
    for_each_piece,
    page_of,
)

WARPS = 4 // CONSUMERS  # a consumer; each copies its share of a tile's blocks


def produce(arrays: Arrays, shared: Shared, shape: KernelShape) -> None:
    """Copies keys and values of all pieces of this program."""
    stages, block_size = shape.launch.stages, shape.block_size
    nowhere = shape.num_blocks * shape.num_kv_heads  # past the end: TMA writes zeros
    count = shape.tile_blocks // WARPS

    def stream(warp: Any) -> None:
        consumer, first_block = lax.div(warp, WARPS), lax.rem(warp, WARPS) * count

        def acquire(step: Any) -> Any:
            """The stage of that tile, when what it held `stages` tiles ago has been consumed."""
            stage = consumer * stages + lax.rem(step, stages)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(shared.free.at[stage]))
            return stage

        def visit(piece: Piece, step: Any) -> Any:
            def pages_of(tile: Any) -> tuple[Any, ...]:
                pages = []
                for block in range(count):
                    offset = (tile * shape.tile_blocks + first_block + block) * block_size
                    column = jnp.minimum(lax.div(piece.begin + offset, block_size), shape.table_width - 1)
                    page = page_of(arrays, piece, column, shape)
                    pages.append(lax.select(offset < piece.keys, page, nowhere))
                return tuple(pages)

            def fetch(tile: Any, carry: tuple[Any, tuple[Any, ...]]) -> tuple[Any, tuple[Any, ...]]:
                step, pages = carry
                following = pages_of(tile + 1)  # a tile ahead
                stage = acquire(step)
                for cache, ring in ((arrays.k_cache, shared.k), (arrays.v_cache, shared.v)):
                    for block, page in enumerate(pages):
                        rows = pl.ds((first_block + block) * block_size, block_size)
                        plgpu.copy_gmem_to_smem(cache.at[page], ring.at[stage, rows], shared.ready.at[stage])
                return step + 1, following

            return lax.fori_loop(0, piece.tiles(shape), fetch, (step, pages_of(jnp.int32(0))))[0]

        steps = for_each_piece(arrays, consumer, shape, visit, jnp.int32(0))
        for ahead in range(stages):  # nothing may be under way when a program ends
            acquire(steps + ahead)

    plgpu.warp_map(stream)
