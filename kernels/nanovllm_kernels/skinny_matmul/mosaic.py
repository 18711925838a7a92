"""Pallas Mosaic GPU implementation for sm_90: launch of the kernel in `mosaic_device.py`."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from nanovllm_kernels._mosaic import Registers, Roles, warpgroup_kernel
from nanovllm_kernels.skinny_matmul.launch import Tiling, padded_rows
from nanovllm_kernels.skinny_matmul.mosaic_device import Place, consume, produce
from nanovllm_kernels.skinny_matmul.mosaic_shape import ProductShape, scratch_types_of, shape_of

_REGISTERS = Registers(consumer=216, producer=40)


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _product(
    x: Float[Array, "M K"], w: Array, others: dict[str, Any], *, shape: ProductShape, interpret: Any
) -> list[Array]:
    """The kernel; a jitted function of its own, so that the layers of a model lower it once."""
    tile = shape.tiling
    (col_tiles, row_tiles), splits = shape.tiles, tile.splits
    out_types = [jax.ShapeDtypeStruct((shape.num_rows, shape.num_outputs), shape.dtype)]
    if shape.next_norm:
        squares = jax.ShapeDtypeStruct((col_tiles * splits, padded_rows(shape.num_rows)), jnp.float32)
        out_types += [out_types[0], squares]

    def program(x: Any, w: Any, others: Any, *refs: Any) -> Roles:
        *outs, scratch = refs
        split = lax.axis_index("split") if splits > 1 else 0
        place = Place(lax.axis_index("row") * tile.tile_rows, lax.axis_index("col"), split)
        return (
            lambda consumer: consume(outs, others, scratch, shape, consumer, place),
            lambda: produce(x, w, others, scratch, shape, place),
        )

    # Which programs are neighbours decides what they find in L2: 256 rows of down take 7.4 us in clusters whose columns
    # follow each other, and 8.6 if their rows do; qkv without clusters 6.2 if its rows do, and 6.5 otherwise.
    grid = {"col": col_tiles, "row": row_tiles} if splits == 1 else {"row": row_tiles, "col": col_tiles}
    return warpgroup_kernel(
        program,
        registers=_REGISTERS,
        scratch_types=scratch_types_of(shape),
        out_type=out_types,
        grid=grid,
        cluster={"split": splits} if splits > 1 else {},
        streams=True,
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
    squares: Float[Array, "parts rows"] | None = None,
    next_norm: Float[Array, " N"] | None = None,
    interpret: Any = None,
) -> list[Array]:
    """As `skinny_matmul`, for 16-bit weights [K, N] or [K, 2, N] that `tiling` fits; a list of all results.

    Norms, bias and residual are cast to x's dtype. K is split where there is one product without a norm, and not in
    Mosaic's interpreter, whose parameters `interpret` are: programs do not run at the same time there.
    """
    if w.ndim == 3 or norm is not None or interpret is not None:
        tiling = replace(tiling, splits=1)
    given = {"norm": norm, "bias": bias, "residual": residual, "squares": squares, "next_norm": next_norm}
    shape = replace(shape_of(x, w, tiling, **given), eps=eps, interpreted=interpret is not None)
    others = {}
    if norm is not None:
        others["norm"] = norm.astype(x.dtype).reshape(shape.steps, tiling.tile_inputs)
    if bias is not None:
        others["bias"] = bias.astype(x.dtype).reshape(shape.parts, shape.num_outputs)
    if residual is not None:
        others["residual"] = residual.astype(x.dtype)
    if squares is not None:
        others["squares"] = squares
    if next_norm is not None:
        others["next_norm"] = next_norm.astype(x.dtype)
    with jax.named_scope("product_mosaic"):  # a Mosaic kernel has no name of its own
        return _product(x, w, others, shape=shape, interpret=interpret)
