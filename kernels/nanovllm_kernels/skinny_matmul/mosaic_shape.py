"""What the Mosaic kernel is compiled for, and the shared memory that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from nanovllm_kernels._integers import ceil_div
from nanovllm_kernels._mosaic import CONSUMER_ROWS, CONSUMERS, swizzled
from nanovllm_kernels.skinny_matmul.launch import PIECES, Tiling

_WIDE_BYTES = 128  # the widest swizzle
_ALIGNMENT, _MOSAICS_BYTES = 1024, 2048  # of arrays in shared memory; what Mosaic (jax 0.11.2) adds to all of them


@dataclass(frozen=True)
class ProductShape:
    """What the kernel is compiled for."""

    num_rows: int
    num_inputs: int
    num_outputs: int
    gated: bool
    norm: bool
    bias: bool
    residual: bool
    dtype: Any
    tiling: Tiling
    eps: float = 0.0
    square_parts: int = 0  # in which the sums of squares of a scaled x come; 0: x is not scaled
    next_norm: bool = False
    interpreted: bool = False

    @property
    def parts(self) -> int:
        """2 with gate and up, whose columns one program computes."""
        return 1 + self.gated

    @property
    def x_in_registers(self) -> bool:
        """Whether wgmma takes x from registers: to scale it there, or since w's rows in shared memory are narrow.

        Both operands in shared memory must be alike, and many rows of x in rows as narrow cost more than their way
        through registers: 64 rows of Qwen3-8B's gate_up over four GPUs take 21.3 instead of 16.8 us (H200).
        """
        narrow = self.tiling.tile_cols * jnp.dtype(self.dtype).itemsize % _WIDE_BYTES != 0
        return self.norm or (narrow and self.tiling.tile_rows * self.parts >= CONSUMER_ROWS)

    @property
    def pieces(self) -> tuple[int, ...]:
        """Columns of the pieces in which a tile of w is copied and multiplied.

        A tile stays whole where anything else is read or passed on by its columns, where wgmma wants x's swizzle for
        w, and where the tiles are odd in number: N is no multiple of the wide piece then, and Mosaic moves none such.
        """
        others = self.bias or self.residual or self.next_norm
        whole = self.tiling.pieces == 1 or others or not self.x_in_registers or self.tiles[0] % 2 == 1
        return (self.tiling.tile_cols,) if whole else PIECES[self.tiling.tile_cols]

    def piece_columns(self, number: Any, cols: int) -> list[tuple[Any, int]]:
        """The first column and the number of columns of each piece of tile `number`, where tiles are `cols` wide.

        The wide piece begins where a row of its swizzle does: before the narrow one in even tiles, else after it.
        """
        if len(self.pieces) == 1:
            return [(number * cols, cols)]
        (wide, narrow), pair, odd = self.pieces, number // 2, number % 2
        # Products with constants, by which Mosaic sees that no piece begins within a row of its swizzle.
        return [(wide * (3 * pair + 2 * odd), wide), (narrow * (6 * pair + 2 + odd), narrow)]

    @property
    def steps(self) -> int:
        """Of K: stages that pass through a program's ring."""
        return self.num_inputs // self.tiling.tile_inputs // self.tiling.splits

    @property
    def own_cols(self) -> int:
        """Columns that a program finishes."""
        return self.tiling.tile_cols // self.tiling.splits

    @property
    def tiles(self) -> tuple[int, int]:
        """Of columns and of rows."""
        return self.num_outputs // self.tiling.tile_cols, ceil_div(self.num_rows, self.tiling.tile_rows)


def shape_of(x: Any, w: Any, tiling: Tiling, **given: Any) -> ProductShape:
    """What the kernel is compiled for, of what `skinny_matmul` is given: arrays, or shapes, or None."""
    there = {name: given[name] is not None for name in ("norm", "bias", "residual", "next_norm")}
    return ProductShape(
        num_rows=x.shape[0],
        num_inputs=x.shape[1],
        num_outputs=w.shape[-1],
        gated=w.ndim == 3,
        dtype=x.dtype,
        tiling=tiling,
        square_parts=0 if given["squares"] is None else len(given["squares"]),
        **there,
    )


def scratch_types_of(shape: ProductShape) -> dict[str, Any]:
    """Shared memory and barriers by name."""
    tile = shape.tiling
    # Wgmma wants both its sides alike, if both come from shared memory.
    common = tile.tile_inputs if shape.x_in_registers else math.gcd(tile.tile_inputs, tile.tile_cols)
    x_transforms = swizzled(shape.dtype, common)
    # A consumer reads 64 rows of any stage. Where a tile has fewer, those of the stages after it follow.
    whole_rows = max(tile.tile_rows, CONSUMER_ROWS)
    x_rows = (tile.num_stages - 1) * tile.tile_rows + whole_rows
    outputs = [
        plgpu.SMEM(
            (whole_rows, cols // tile.splits), shape.dtype, transforms=swizzled(shape.dtype, cols // tile.splits)
        )
        for cols in shape.pieces
    ]
    types = {
        "x": plgpu.SMEM((x_rows, tile.tile_inputs), shape.dtype, transforms=x_transforms),
        "w": [
            plgpu.SMEM(
                (tile.num_stages, shape.parts, tile.tile_inputs, cols),
                shape.dtype,
                transforms=swizzled(shape.dtype, cols) if shape.x_in_registers else x_transforms,
            )
            for cols in shape.pieces
        ],
        "out": outputs,
        "ready": plgpu.Barrier(num_arrivals=1 + shape.parts * len(shape.pieces), num_barriers=tile.num_stages),
        "free": plgpu.Barrier(num_arrivals=1 if tile.splits_inputs else CONSUMERS, num_barriers=tile.num_stages),
    }
    if tile.splits > 1:
        # What another program sends to each consumer that adds; what the consumers of a program leave to each other.
        own_sums = (whole_rows * shape.own_cols,)
        types["inbox"] = plgpu.SMEM((tile.splits - 1, *own_sums), jnp.float32)
        if tile.splits_inputs:
            types["halves"] = plgpu.SMEM((tile.splits, *own_sums), jnp.float32)
    elif tile.splits_inputs:
        types |= {
            "sums": [
                plgpu.SMEM((shape.parts, CONSUMER_ROWS, cols), jnp.float32, transforms=swizzled(jnp.float32, cols))
                for cols in shape.pieces
            ],
            "squares": plgpu.SMEM((CONSUMER_ROWS,), jnp.float32),
            "sums_ready": plgpu.Barrier(),
        }
    if shape.norm:
        types |= {"norm": plgpu.SMEM((shape.steps, tile.tile_inputs), shape.dtype), "norm_ready": plgpu.Barrier()}
    if shape.bias:
        types |= {
            "bias": plgpu.SMEM((shape.parts, shape.own_cols), shape.dtype),
            "bias_ready": plgpu.Barrier(num_arrivals=shape.parts),
        }
    if shape.residual:
        types["residual_ready"] = plgpu.Barrier()
    if shape.next_norm:
        types |= {
            "next_norm": plgpu.SMEM((shape.own_cols,), shape.dtype),
            "next_norm_ready": plgpu.Barrier(),
            "scaled": outputs[0],
            "out_squares": plgpu.SMEM((whole_rows,), jnp.float32),
        }
    return types


def takes(shape: ProductShape, shared_bytes: int) -> bool:
    """Whether the kernel runs a product with the shape's tiling in so much shared memory.

    K is split where there is one product without a norm.
    """
    if shape.tiling.splits > 1 and (shape.gated or shape.norm):
        return False
    wanted = _MOSAICS_BYTES
    for each in jax.tree.leaves(scratch_types_of(shape)):
        if isinstance(each, plgpu.Barrier):
            wanted += 8 * int(np.prod(each.num_barriers))
        else:
            size = math.prod(each.shape) * jnp.dtype(each.dtype).itemsize
            wanted += ceil_div(size, _ALIGNMENT) * _ALIGNMENT
    return wanted <= shared_bytes
