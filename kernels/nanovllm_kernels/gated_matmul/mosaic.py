"""Pallas Mosaic GPU implementation for sm_90: launch of the kernel in `mosaic_device.py`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jaxtyping import Array, Float

from nanovllm_kernels._compat import current_target
from nanovllm_kernels.gated_matmul.mosaic_device import (
    CONSUMER_ROWS,
    CONSUMERS,
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

# Three warpgroups start with 168 each, which is what they can shift between them.
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 232, 40


def scratch_types_of(shape: ProductShape) -> dict[str, Any]:
    """Shared memory and barriers by name."""
    tile = shape.tiling
    # wgmma reads tiles of 8 rows by 128 bytes with 128-byte swizzle.
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    w_tiles = (tile.num_stages, PARTS, tile.tile_inputs, TILE_COLS)
    return {
        "x": plgpu.SMEM((tile.num_stages, TILE_ROWS, tile.tile_inputs), shape.dtype, transforms=transforms),
        "w": plgpu.SMEM(w_tiles, shape.dtype, transforms=transforms),
        "out": plgpu.SMEM((CONSUMERS, CONSUMER_ROWS, TILE_COLS), shape.dtype, transforms=transforms),
        "ready": plgpu.Barrier(num_arrivals=1 + PARTS, num_barriers=tile.num_stages),
        "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.num_stages),
        "started": plgpu.Barrier(),
    }


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _gated(
    x: Float[Array, "M K"], w: Float[Array, "K 2 F"], *, shape: ProductShape, interpret: Any
) -> Float[Array, "M F"]:
    """The kernel; a jitted function of its own, so that the layers of a model lower it once."""

    def kernel(x: Any, w: Any, out: Any, shared: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")

        def finish(sums: list[Array], first_row: Any, col: Any) -> None:
            result, staged = activated(*sums).astype(shape.dtype), shared["out"].at[warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
            staged[...] = result
            plgpu.commit_smem()
            target = out.at[pl.ds(first_row, CONSUMER_ROWS), pl.ds(col * TILE_COLS, TILE_COLS)]
            plgpu.copy_smem_to_gmem(staged, target)

        @pl.when(warpgroup < CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
            consume(shape, shared, warpgroup, finish)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            produce(shape, shared, x, w)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((shape.num_rows, shape.num_cols), shape.dtype),
        scratch_types=[scratch_types_of(shape)],
        grid=(shape.programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        # Warpgroups touch shared memory between explicit barriers and commits only.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
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
