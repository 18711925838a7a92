"""Pallas Mosaic GPU implementation for sm_90: launch of the kernel in `mosaic_device.py`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxtyping import Array, Float

from nanovllm_kernels._compat import current_target
from nanovllm_kernels._mosaic import CONSUMER_ROWS, CONSUMERS, Registers, Roles, swizzled, warpgroup_kernel
from nanovllm_kernels.gated_matmul.mosaic_device import (
    DEFAULT_TILING,
    PARTS,
    TILE_COLS,
    TILE_ROWS,
    ProductShape,
    Tiling,
    activated,
    consume,
    num_tiles,
    produce,
)

_REGISTERS = Registers(consumer=232, producer=40)


def scratch_types_of(shape: ProductShape) -> dict[str, Any]:
    """Shared memory and barriers by name."""
    tile = shape.tiling
    x_tiles = (tile.num_stages, TILE_ROWS, tile.tile_inputs)
    w_tiles = (tile.num_stages, PARTS, tile.tile_inputs, TILE_COLS)
    out_tiles = (CONSUMERS, CONSUMER_ROWS, TILE_COLS)
    in_inputs, in_columns = swizzled(shape.dtype, tile.tile_inputs), swizzled(shape.dtype, TILE_COLS)
    return {
        "x": plgpu.SMEM(x_tiles, shape.dtype, transforms=in_inputs),
        "w": plgpu.SMEM(w_tiles, shape.dtype, transforms=in_columns),
        "out": plgpu.SMEM(out_tiles, shape.dtype, transforms=in_columns),
        "ready": plgpu.Barrier(num_arrivals=1 + PARTS, num_barriers=tile.num_stages),
        "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.num_stages),
        "started": plgpu.Barrier(),
    }


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _gated(
    x: Float[Array, "M K"], w: Float[Array, "K 2 F"], *, shape: ProductShape, interpret: Any
) -> Float[Array, "M F"]:
    """The kernel; a jitted function of its own, so that the layers of a model lower it once."""

    def program(x: Any, w: Any, out: Any, shared: Any) -> Roles:
        def consume_and_store(consumer: Any) -> None:
            staged = shared["out"].at[consumer]

            def finish(sums: list[Array], first_row: Any, col: Any) -> None:
                result = activated(*sums).astype(shape.dtype)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
                staged[...] = result
                plgpu.commit_smem()
                target = out.at[pl.ds(first_row, CONSUMER_ROWS), pl.ds(col * TILE_COLS, TILE_COLS)]
                plgpu.copy_smem_to_gmem(staged, target)

            consume(shape, shared, consumer, finish)
            plgpu.wait_smem_to_gmem(0)

        return consume_and_store, lambda: produce(shape, shared, x, w)

    return warpgroup_kernel(
        program,
        registers=_REGISTERS,
        scratch_types=scratch_types_of(shape),
        out_type=jax.ShapeDtypeStruct((shape.num_rows, shape.num_cols), shape.dtype),
        grid={"program": shape.programs},
        interpret=interpret,
    )(x, w)


def gated_matmul_mosaic(
    x: Float[Array, "M K"], w: Float[Array, "K 2 F"], *, tiling: Tiling = DEFAULT_TILING, interpret: Any = None
) -> Float[Array, "M F"]:
    """As `gated_matmul` without bias, for what `fits` says; `interpret`: parameters of Mosaic's interpreter."""
    (num_rows, num_inputs), num_cols = x.shape, w.shape[2]
    shape = ProductShape(
        num_rows=num_rows,
        num_inputs=num_inputs,
        num_cols=num_cols,
        dtype=x.dtype,
        tiling=tiling,
        programs=min(current_target().multiprocessors, num_tiles(num_rows, num_cols)),
    )
    with jax.named_scope("product_mosaic"):  # a Mosaic kernel has no name of its own
        return _gated(x, w, shape=shape, interpret=interpret)
