"""Pallas Mosaic GPU implementation for sm_90: launch of the kernel in `mosaic_device.py`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from nanovllm_kernels._device import ceil_div
from nanovllm_kernels._mosaic import CONSUMER_ROWS, CONSUMERS, Registers, Roles, swizzled, warpgroup_kernel
from nanovllm_kernels.skinny_matmul.launch import Tiling
from nanovllm_kernels.skinny_matmul.mosaic_device import ProductShape, consume, produce

_REGISTERS = Registers(consumer=216, producer=40)


def scratch_types_of(shape: ProductShape) -> dict[str, Any]:
    """Shared memory and barriers by name."""
    tile = shape.tiling
    in_columns = swizzled(shape.dtype, tile.tile_cols)
    # Wgmma wants both its sides alike, if both come from shared memory.
    x_transforms = swizzled(shape.dtype, tile.tile_inputs) if shape.norm else in_columns
    # A consumer reads 64 rows of any stage. Where a tile has fewer, those of the stages after it follow.
    whole_rows = max(tile.tile_rows, CONSUMER_ROWS)
    x_rows = (tile.num_stages - 1) * tile.tile_rows + whole_rows
    types = {
        "x": plgpu.SMEM((x_rows, tile.tile_inputs), shape.dtype, transforms=x_transforms),
        "w": plgpu.SMEM(
            (tile.num_stages, shape.parts, tile.tile_inputs, tile.tile_cols),
            shape.dtype,
            transforms=in_columns,
        ),
        "out": plgpu.SMEM((whole_rows, tile.tile_cols), shape.dtype, transforms=in_columns),
        "ready": plgpu.Barrier(num_arrivals=1 + shape.parts, num_barriers=tile.num_stages),
        "free": plgpu.Barrier(num_arrivals=1 if tile.splits_inputs else CONSUMERS, num_barriers=tile.num_stages),
    }
    if tile.splits_inputs:
        sums = (shape.parts, CONSUMER_ROWS, tile.tile_cols)
        types |= {
            "sums": plgpu.SMEM(sums, jnp.float32, transforms=swizzled(jnp.float32, tile.tile_cols)),
            "squares": plgpu.SMEM((CONSUMER_ROWS,), jnp.float32),
            "sums_ready": plgpu.Barrier(),
        }
    if shape.norm:
        types |= {"norm": plgpu.SMEM((shape.steps, tile.tile_inputs), shape.dtype), "norm_ready": plgpu.Barrier()}
    if shape.bias:
        types |= {
            "bias": plgpu.SMEM((shape.parts, tile.tile_cols), shape.dtype),
            "bias_ready": plgpu.Barrier(num_arrivals=shape.parts),
        }
    if shape.residual:
        types["residual_ready"] = plgpu.Barrier()
    return types


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _product(
    x: Float[Array, "M K"], w: Array, others: dict[str, Array], *, shape: ProductShape, interpret: Any
) -> Float[Array, "M N"]:
    """The kernel; a jitted function of its own, so that the layers of a model lower it once."""
    tile = shape.tiling

    def program(x: Any, w: Any, others: Any, out: Any, scratch: Any) -> Roles:
        first_col = lax.axis_index("col") * tile.tile_cols
        first_row = lax.axis_index("row") * tile.tile_rows
        return (
            lambda consumer: consume(out, scratch, shape, consumer, first_row, first_col),
            lambda: produce(x, w, others, scratch, shape, first_row, first_col),
        )

    return warpgroup_kernel(
        program,
        registers=_REGISTERS,
        scratch_types=scratch_types_of(shape),
        out_type=jax.ShapeDtypeStruct((shape.num_rows, shape.num_outputs), shape.dtype),
        grid={"col": shape.num_outputs // tile.tile_cols, "row": ceil_div(shape.num_rows, tile.tile_rows)},
        interpret=interpret,
    )(x, w, others)


def skinny_matmul_mosaic(
    x: Float[Array, "M K"],
    w: Array,
    *,
    norm: Float[Array, " K"] | None,
    eps: float,
    bias: Array | None,
    residual: Float[Array, "M N"] | None,
    tiling: Tiling,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """As `skinny_matmul`, for 16-bit weights [K, N] or [K, 2, N] that `tiling` fits.

    Norm, bias and residual are cast to x's dtype. `interpret`: parameters of Mosaic's interpreter.
    """
    (num_rows, num_inputs), gated = x.shape, w.ndim == 3
    shape = ProductShape(
        num_rows=num_rows,
        num_inputs=num_inputs,
        num_outputs=w.shape[-1],
        gated=gated,
        norm=norm is not None,
        bias=bias is not None,
        residual=residual is not None,
        eps=eps,
        dtype=x.dtype,
        tiling=tiling,
        interpreted=interpret is not None,
    )
    others = {}
    if norm is not None:
        others["norm"] = norm.astype(x.dtype).reshape(shape.steps, tiling.tile_inputs)
    if bias is not None:
        others["bias"] = bias.astype(x.dtype).reshape(shape.parts, shape.num_outputs)
    if residual is not None:
        others["residual"] = residual.astype(x.dtype)
    with jax.named_scope("product_mosaic"):  # a Mosaic kernel has no name of its own
        return _product(x, w, others, shape=shape, interpret=interpret)
