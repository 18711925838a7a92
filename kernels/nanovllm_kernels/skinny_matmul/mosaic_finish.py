"""Device code of the Mosaic implementation: what follows the product, in registers.

Refs and scalars of a kernel have no Python type that says more than Any.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from nanovllm_kernels._mosaic import CONSUMER_ROWS
from nanovllm_kernels.skinny_matmul.mosaic_shape import ProductShape

ROW_LAYOUT, COL_LAYOUT = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def given_squares(squares: Any, shape: ProductShape, first_row: Any) -> Float[Array, " rows"]:
    """Sums of squares of 64 rows, of the parts that come with a scaled x."""
    parts = [
        plgpu.load(squares.at[part, pl.ds(first_row, CONSUMER_ROWS)], layout=ROW_LAYOUT, optimized=False)
        for part in range(shape.square_parts)
    ]
    return sum(parts[1:], parts[0])


def finish(
    sums: list[Array],
    squares: Any,
    outs: Any,
    scratch: Any,
    shape: ProductShape,
    row: Any,
    first_row: Any,
    col: Any,
) -> None:
    """Everything after the product, and the stores, of the 64 rows that begin at `row` of the tile.

    `first_row` is theirs in the output, `col` the number of the program's columns.
    """
    rows = pl.ds(row, CONSUMER_ROWS)
    if squares is not None:
        scale = lax.rsqrt(squares * (1 / shape.num_inputs) + shape.eps)
        sums = [each * lax.broadcast_in_dim(scale, each.shape, [0]) for each in sums]
    for piece, out in enumerate(scratch["out"]):
        rounded = _rounded(sums[piece * shape.parts :][: shape.parts], out.at[rows], scratch, shape)
        out.at[rows][...] = rounded
        if shape.next_norm:
            _pass_on(rounded, scratch, rows)
    plgpu.commit_smem()
    stored = min(CONSUMER_ROWS, shape.tiling.tile_rows)
    source, target = pl.ds(row, stored), pl.ds(first_row, stored)
    columns = [pl.ds(*each) for each in shape.piece_columns(col, shape.own_cols)]
    for out, cols in zip(scratch["out"], columns, strict=True):
        plgpu.copy_smem_to_gmem(out.at[source], outs[0].at[target, cols])
    if shape.next_norm:
        plgpu.copy_smem_to_gmem(scratch["scaled"].at[source], outs[1].at[target, columns[0]])
        plgpu.copy_smem_to_gmem(scratch["out_squares"].at[source], outs[2].at[col, target])
    plgpu.wait_smem_to_gmem(0)


def _rounded(sums: list[Array], out: Any, scratch: Any, shape: ProductShape) -> Array:
    """What `out` will be, of a piece's scaled sums.

    Bias and residual are waited for once: a tile that has them is one piece.
    """
    if shape.bias:
        plgpu.barrier_wait(scratch["bias_ready"])
        biases = [
            plgpu.load(scratch["bias"].at[part], layout=COL_LAYOUT, optimized=False) for part in range(shape.parts)
        ]
        sums = [
            each + lax.broadcast_in_dim(bias.astype(jnp.float32), each.shape, [1])
            for each, bias in zip(sums, biases, strict=True)
        ]
    result = sums[0]
    if shape.gated:
        gate, up = sums
        result = gate / (1 + jnp.exp(-gate)) * up
    if shape.residual:
        plgpu.barrier_wait(scratch["residual_ready"])
        # It lies where the outputs will: each thread reads what it is about to overwrite.
        residual = plgpu.load(out, layout=plgpu.Layout.WGMMA)
        result = result + residual.astype(jnp.float32)
    return result.astype(shape.dtype)


def _pass_on(rounded: Array, scratch: Any, rows: Any) -> None:
    """The sums of squares of a tile's results, and the results times the weight of the norm that follows."""
    wide = rounded.astype(jnp.float32)
    scratch["out_squares"].at[rows][...] = jnp.sum(wide * wide, axis=1)
    plgpu.barrier_wait(scratch["next_norm_ready"])
    norm = plgpu.load(scratch["next_norm"], layout=COL_LAYOUT, optimized=False)
    scratch["scaled"].at[rows][...] = rounded * lax.broadcast_in_dim(norm, rounded.shape, [1])
