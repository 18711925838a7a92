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
    TILE_COLS,
    TILE_ROWS,
    ProductShape,
    Tiling,
    consume,
    produce,
    silu_mul,
)

# Three warpgroups start with 168 each, which is what they can shift between them.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
_HALF = TILE_COLS // 2


def scratch_types_of(shape: ProductShape, out: Any) -> list[dict[str, Any]]:
    """Shared memory by name, `out` included, and barriers. Tiles are aligned to 1,024 bytes, so barriers come last."""
    tile = shape.tiling
    # wgmma reads tiles of 8 rows by 128 bytes with 128-byte swizzle.
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    w_tile = (tile.num_stages, shape.parts, tile.tile_inputs, TILE_COLS // shape.parts)
    tiles = {
        "x": plgpu.SMEM((tile.num_stages, TILE_ROWS, tile.tile_inputs), shape.dtype, transforms=transforms),
        "w": plgpu.SMEM(w_tile, shape.dtype, transforms=transforms),
        "out": out,
    }
    free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.num_stages)
    if tile.cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=("peer",), num_arrivals=CONSUMERS, num_barriers=tile.num_stages)
    barriers: dict[str, Any] = {
        "ready": plgpu.Barrier(num_arrivals=1 + shape.parts, num_barriers=tile.num_stages),
        "free": free,
    }
    if tile.head_start:
        barriers["started"] = plgpu.Barrier()
    return [tiles, barriers]


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _gated(x: Float[Array, "M K"], w: Float[Array, "K 2 F"], *, shape: ProductShape, interpret: Any) -> Array:
    """The kernel; a jitted function of its own, so that the layers of a model lower it once."""
    tile = shape.tiling
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    outs = plgpu.SMEM((CONSUMERS, CONSUMER_ROWS, _HALF), shape.dtype, transforms=transforms)

    def kernel(x: Any, w: Any, out: Any, tiles: Any, barriers: Any) -> None:
        shared = tiles | barriers
        warpgroup = lax.axis_index("warpgroup")

        def fetch_w(inputs: Any, col: Any, target: Any, ready: Any) -> None:
            for part in range(2):
                plgpu.copy_gmem_to_smem(
                    w.at[inputs, part, pl.ds(col * _HALF, _HALF)],
                    target.at[part],
                    ready,
                    collective_axes="peer" if tile.cluster > 1 else None,
                )

        def finish(sums: Any, first_row: Any, col: Any) -> None:
            result = silu_mul(*sums).astype(shape.dtype)
            staged = shared["out"].at[warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
            staged[...] = result
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(first_row, CONSUMER_ROWS), pl.ds(col * _HALF, _HALF)])

        @pl.when(warpgroup < CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            consume(shape, shared, warpgroup, finish)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            produce(shape, shared, x, fetch_w)

    clustered = {"cluster": (tile.cluster,), "cluster_names": ("peer",)} if tile.cluster > 1 else {}
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((shape.num_rows, shape.num_cols // 2), shape.dtype),
        scratch_types=scratch_types_of(shape, outs),
        grid=(shape.clusters,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        # Warpgroups touch shared memory between explicit barriers and commits only.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
        **clustered,
    )(x, w)


def gated_matmul_mosaic(
    x: Float[Array, "M K"], w: Float[Array, "K 2 F"], *, tiling: Tiling = DEFAULT_TILING, interpret: Any = None
) -> Float[Array, "M F"]:
    shape = ProductShape(
        num_rows=x.shape[0],
        num_inputs=x.shape[1],
        num_cols=2 * w.shape[2],
        parts=2,
        dtype=x.dtype,
        tiling=tiling,
        programs=current_target().multiprocessors,
    )
    with jax.named_scope("product_mosaic"):  # a Mosaic kernel has no name of its own
        return _gated(x, w, shape=shape, interpret=interpret)
