"""Pallas Mosaic GPU implementation for sm_90: launch of the kernel in `mosaic_device.py`."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from nanovllm_kernels._integers import ceil_div
from nanovllm_kernels._mosaic import CONSUMER_ROWS, Registers, Roles, warpgroup_kernel
from nanovllm_kernels.skinny_matmul.launch import Tiling, padded_rows
from nanovllm_kernels.skinny_matmul.mosaic_device import Place, consume, produce
from nanovllm_kernels.skinny_matmul.mosaic_shape import ProductShape, scratch_types_of, share_of

_REGISTERS = Registers(consumer=216, producer=40)


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _product(
    x: Float[Array, "M K"], w: Array, others: dict[str, Any], *, shape: ProductShape, interpret: Any
) -> list[Array]:
    """The kernel; a jitted function of its own, so that the layers of a model lower it once."""
    tile = shape.tiling
    col_tiles = shape.tiles[0]
    out_types = [jax.ShapeDtypeStruct((shape.num_rows, shape.num_outputs), shape.dtype)]
    if shape.next_norm:
        squares = jax.ShapeDtypeStruct((col_tiles, padded_rows(shape.num_rows)), jnp.float32)
        out_types += [out_types[0], squares]
    results, helped = len(out_types), tile.helped_steps > 0
    if helped:
        sums = (math.prod(shape.tiles), CONSUMER_ROWS, tile.tile_cols)
        out_types.append(jax.ShapeDtypeStruct(sums, jnp.float32))

    def program(x: Any, w: Any, others: Any, *refs: Any) -> Roles:
        *outs, scratch = refs
        if helped:
            others = others | {"help": outs.pop()}
        col, row = lax.axis_index("col"), lax.axis_index("row")
        share = share_of(lax.axis_index("role"), shape)
        place = Place(row * tile.tile_rows, col, col * shape.tiles[1] + row, share)
        return (
            lambda consumer: consume(outs, others, scratch, shape, consumer, place),
            lambda: produce(x, w, others, scratch, shape, place),
        )

    return warpgroup_kernel(
        program,
        registers=_REGISTERS,
        scratch_types=scratch_types_of(shape),
        out_type=out_types,
        grid={"role": 1 + helped, "col": col_tiles, "row": shape.tiles[1]},
        interpret=interpret,
    )(x, w, others)[:results]


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
    counters: jax.Ref | None = None,
    interpret: Any = None,
) -> list[Array]:
    """As `skinny_matmul`, for 16-bit weights [K, N] or [K, 2, N] that `tiling` fits; a list of all results.

    Norms, bias and residual are cast to x's dtype. Tiles have helpers in one product without a norm, and with
    `counters`, a word for each. `interpret`: parameters of Mosaic's interpreter.
    """
    (num_rows, num_inputs), gated = x.shape, w.ndim == 3
    tiles = ceil_div(num_rows, tiling.tile_rows) * w.shape[-1] // tiling.tile_cols
    if gated or norm is not None or counters is None or tiles > len(counters):
        tiling = replace(tiling, helped_steps=0)
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
        square_parts=0 if squares is None else len(squares),
        next_norm=next_norm is not None,
        interpreted=interpret is not None,
    )
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
    if tiling.helped_steps:
        others["counters"] = counters
    with jax.named_scope("product_mosaic"):  # a Mosaic kernel has no name of its own
        return _product(x, w, others, shape=shape, interpret=interpret)
