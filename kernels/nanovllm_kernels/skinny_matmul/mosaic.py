"""Pallas Mosaic GPU implementation for sm_90: 64 to 256 rows, where the copies of x and w out of L2 are what takes time.

A program computes one tile of the output. Its producer warpgroup fills a ring of tiles of x and w by TMA; two consumer
warpgroups take its stages in turn, so that one prepares its tile of x while the other has the tensor cores, and their
sums are added at the end. Programs of a cluster that have rows in common share the copies of x, and those that have
columns in common share the copies of w (TMA multicast): a tile is read from L2 once a cluster.

As in the Triton kernel, (x * norm) @ w is scaled by the row's 1 / rms at the end. x * norm is formed in registers, from
where wgmma takes its left side.

Refs and scalars of a kernel have no Python type that says more than Any.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from nanovllm_kernels._device import ceil_div
from nanovllm_kernels.skinny_matmul.launch import CONSUMER_ROWS, CONSUMERS, Tiling

_CLUSTER_AXES = ("cluster_col", "cluster_row")
_ROW_LAYOUT, _COL_LAYOUT = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


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
    eps: float
    dtype: Any
    tiling: Tiling
    interpreted: bool = False

    @property
    def parts(self) -> int:
        """2 with gate and up, whose columns one program computes."""
        return 1 + self.gated

    @property
    def consumer_steps(self) -> int:
        """Stages that a consumer takes."""
        return self.steps // CONSUMERS if self.tiling.splits_inputs else self.steps

    @property
    def steps(self) -> int:
        """Stages that pass through the ring."""
        return self.num_inputs // self.tiling.tile_inputs


def scratch_types_of(shape: ProductShape) -> dict[str, Any]:
    """Shared memory and barriers by name."""
    tile = shape.tiling
    swizzled = functools.partial(_swizzled, cols=tile.tile_cols)
    types = {
        "x": plgpu.SMEM(
            (tile.num_stages, tile.tile_rows, tile.tile_inputs), shape.dtype, transforms=swizzled(shape.dtype)
        ),
        "w": plgpu.SMEM(
            (tile.num_stages, shape.parts, tile.tile_inputs, tile.tile_cols),
            shape.dtype,
            transforms=swizzled(shape.dtype),
        ),
        "out": plgpu.SMEM((tile.tile_rows, tile.tile_cols), shape.dtype, transforms=swizzled(shape.dtype)),
        "ready": plgpu.Barrier(num_arrivals=1 + shape.parts, num_barriers=tile.num_stages),
        "free": plgpu.ClusterBarrier(
            collective_axes=_CLUSTER_AXES,
            num_arrivals=1 if shape.tiling.splits_inputs else CONSUMERS,
            num_barriers=tile.num_stages,
        ),
    }
    if shape.tiling.splits_inputs:
        sums = (shape.parts, CONSUMER_ROWS, tile.tile_cols)
        types |= {
            "sums": plgpu.SMEM(sums, jnp.float32, transforms=_transforms(128, 32)),
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
        types |= {
            "residual": plgpu.SMEM((tile.tile_rows, tile.tile_cols), shape.dtype, transforms=swizzled(shape.dtype)),
            "residual_ready": plgpu.Barrier(),
        }
    return types


def _swizzled(dtype: Any, cols: int) -> tuple[Any, ...]:
    """Of tiles of x and w: wgmma wants both alike, and w's rows are `cols` wide."""
    num_bytes = min(128, cols * jnp.dtype(dtype).itemsize)
    return _transforms(num_bytes, num_bytes // jnp.dtype(dtype).itemsize)


def _transforms(num_bytes: int, elements: int) -> tuple[Any, ...]:
    return (plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(num_bytes))  # pyright: ignore[reportAbstractUsage]


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _product(operands: dict[str, Array], *, shape: ProductShape, interpret: Any) -> Float[Array, "M N"]:
    """The kernel; a jitted function of its own, so that the layers of a model lower it once."""
    tile = shape.tiling

    def kernel(operands: Any, out: Any, scratch: Any) -> None:
        first_col = (lax.axis_index("col") * tile.cluster_cols + lax.axis_index("cluster_col")) * tile.tile_cols
        first_row = (lax.axis_index("row") * tile.cluster_rows + lax.axis_index("cluster_row")) * tile.tile_rows
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(216, action="increase")
            _consume(out, scratch, shape, warpgroup, first_row, first_col)

        @pl.when(warpgroup == CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")
            _produce(operands, scratch, shape, first_row, first_col)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((shape.num_rows, shape.num_outputs), shape.dtype),
        scratch_types=[scratch_types_of(shape)],
        grid=(
            ceil_div(shape.num_outputs, tile.tile_cols * tile.cluster_cols),
            ceil_div(shape.num_rows, tile.tile_rows * tile.cluster_rows),
        ),
        grid_names=("col", "row"),
        cluster=(tile.cluster_cols, tile.cluster_rows),
        cluster_names=_CLUSTER_AXES,
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        # Warpgroups touch shared memory between explicit barriers and commits only.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(operands)


def _produce(operands: Any, scratch: Any, shape: ProductShape, first_row: Any, first_col: Any) -> None:
    """Fetches everything that the program reads."""
    tile = shape.tiling
    rows, cols = pl.ds(first_row, tile.tile_rows), pl.ds(first_col, tile.tile_cols)
    along_cols = "cluster_col" if tile.cluster_cols > 1 else None
    along_rows = "cluster_row" if tile.cluster_rows > 1 else None
    if shape.norm:
        plgpu.copy_gmem_to_smem(operands["norm"], scratch["norm"], scratch["norm_ready"])

    def fetch(step: Any, _: Any) -> None:
        stage = lax.rem(step, tile.num_stages)
        pl.when(step >= tile.num_stages)(lambda: plgpu.barrier_wait(scratch["free"].at[stage]))
        inputs, ready = pl.ds(step * tile.tile_inputs, tile.tile_inputs), scratch["ready"].at[stage]
        for part in range(shape.parts):
            source = operands["w"].at[inputs, part, cols] if shape.gated else operands["w"].at[inputs, cols]
            plgpu.copy_gmem_to_smem(source, scratch["w"].at[stage, part], ready, collective_axes=along_rows)
        plgpu.copy_gmem_to_smem(
            operands["x"].at[rows, inputs], scratch["x"].at[stage], ready, collective_axes=along_cols
        )

    lax.fori_loop(0, shape.steps, fetch, None)
    if shape.bias:
        for part in range(shape.parts):
            plgpu.copy_gmem_to_smem(operands["bias"].at[part, cols], scratch["bias"].at[part], scratch["bias_ready"])
    if shape.residual:
        plgpu.copy_gmem_to_smem(operands["residual"].at[rows, cols], scratch["residual"], scratch["residual_ready"])
    # Nothing is left unobserved: a barrier must not be taken down under an arrival to come, here or in the cluster.
    for step in range(max(0, shape.steps - tile.num_stages), shape.steps):
        plgpu.barrier_wait(scratch["free"].at[step % tile.num_stages])


def _consume(out: Any, scratch: Any, shape: ProductShape, consumer: Any, first_row: Any, first_col: Any) -> None:
    """One consumer's part of the tile: half of its rows, or, of 64 rows, the sums over half of the inputs."""
    accumulators = [plgpu.ACC((CONSUMER_ROWS, shape.tiling.tile_cols), jnp.float32)] * shape.parts

    def accumulate(*accs: Any) -> tuple[list[Array], Any]:
        squares = (_multiply_scaled if shape.norm else _multiply)(accs, scratch, shape, consumer)
        return [acc[...] for acc in accs], squares

    sums, squares = pl.run_scoped(accumulate, *accumulators)
    if not shape.tiling.splits_inputs:
        row = consumer * CONSUMER_ROWS
        _finish(sums, squares, out, scratch, shape, row, first_row + row, first_col)
        return

    @pl.when(consumer == 1)
    def _() -> None:
        for part in range(shape.parts):
            scratch["sums"].at[part][...] = sums[part]
        if shape.norm:
            scratch["squares"][...] = squares
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["sums_ready"])

    @pl.when(consumer == 0)
    def _() -> None:
        plgpu.barrier_wait(scratch["sums_ready"])
        others = [plgpu.load(scratch["sums"].at[part], layout=plgpu.Layout.WGMMA) for part in range(shape.parts)]
        totals = [own + other for own, other in zip(sums, others, strict=True)]
        total_squares = None
        if shape.norm:
            total_squares = squares + plgpu.load(scratch["squares"], layout=_ROW_LAYOUT, optimized=False)
        _finish(totals, total_squares, out, scratch, shape, 0, first_row, first_col)


def _finish(
    sums: list[Array],
    squares: Any,
    out: Any,
    scratch: Any,
    shape: ProductShape,
    row: Any,
    first_row: Any,
    first_col: Any,
) -> None:
    """Everything after the product, and the store, of the 64 rows that begin at `row` of the tile."""
    rows = pl.ds(row, CONSUMER_ROWS)
    if shape.norm:
        scale = lax.rsqrt(squares * (1 / shape.num_inputs) + shape.eps)
        sums = [each * lax.broadcast_in_dim(scale, each.shape, [0]) for each in sums]
    if shape.bias:
        plgpu.barrier_wait(scratch["bias_ready"])
        biases = [
            plgpu.load(scratch["bias"].at[part], layout=_COL_LAYOUT, optimized=False) for part in range(shape.parts)
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
        residual = plgpu.load(scratch["residual"].at[rows], layout=plgpu.Layout.WGMMA)
        result = result + residual.astype(jnp.float32)
    scratch["out"].at[rows][...] = result.astype(shape.dtype)
    plgpu.commit_smem()
    target = out.at[pl.ds(first_row, CONSUMER_ROWS), pl.ds(first_col, shape.tiling.tile_cols)]
    plgpu.copy_smem_to_gmem(scratch["out"].at[rows], target)
    plgpu.wait_smem_to_gmem(0)


def _position(index: Any, shape: ProductShape, consumer: Any) -> Any:
    """Of a consumer's step among the stages that pass through the ring."""
    return index * CONSUMERS + consumer if shape.tiling.splits_inputs else index


def _x_tile(scratch: Any, shape: ProductShape, stage: Any, consumer: Any) -> Any:
    """A consumer's 64 rows of a stage."""
    return scratch["x"].at[stage, pl.ds(0 if shape.tiling.splits_inputs else consumer * CONSUMER_ROWS, CONSUMER_ROWS)]


def _multiply(accs: Any, scratch: Any, shape: ProductShape, consumer: Any) -> None:
    """x @ w from shared memory; a stage is handed back when the product after it is under way."""
    stages = shape.tiling.num_stages

    def step(index: Any, _: Any) -> None:
        stage = lax.rem(_position(index, shape, consumer), stages)
        plgpu.barrier_wait(scratch["ready"].at[stage])
        for part, acc in enumerate(accs):
            plgpu.wgmma(acc, _x_tile(scratch, shape, stage, consumer), scratch["w"].at[stage, part])
        plgpu.wgmma_wait(len(accs))
        before = lax.rem(_position(index - 1, shape, consumer) + stages, stages)
        pl.when(index > 0)(lambda: plgpu.barrier_arrive(scratch["free"].at[before]))

    lax.fori_loop(0, shape.consumer_steps, step, None)
    plgpu.wgmma_wait(0)
    last = lax.rem(_position(shape.consumer_steps - 1, shape, consumer), stages)
    plgpu.barrier_arrive(scratch["free"].at[last])


def _multiply_scaled(accs: Any, scratch: Any, shape: ProductShape, consumer: Any) -> Float[Array, " rows"]:
    """(x * norm) @ w with x from registers; returns the sums of x squared over the inputs that it took."""
    plgpu.barrier_wait(scratch["norm_ready"])

    def step(index: Any, squares: Any) -> Any:
        position = _position(index, shape, consumer)
        stage = lax.rem(position, shape.tiling.num_stages)
        x_tile = _x_tile(scratch, shape, stage, consumer)
        plgpu.barrier_wait(scratch["ready"].at[stage])
        x = plgpu.load(x_tile, layout=plgpu.Layout.WGMMA)
        norm = plgpu.load(scratch["norm"].at[position], layout=_COL_LAYOUT, optimized=False)
        operand = x * lax.broadcast_in_dim(norm, x.shape, [1])
        if shape.interpreted:  # the interpreter knows wgmma on two references only
            x_tile[...] = operand
            operand = x_tile
        for part, acc in enumerate(accs):
            plgpu.wgmma(acc, operand, scratch["w"].at[stage, part])
        wide = x.astype(jnp.float32)
        squares = squares + jnp.sum(wide * wide, axis=1)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(scratch["free"].at[stage])
        return squares

    zeros = plgpu.layout_cast(jnp.zeros((CONSUMER_ROWS,), jnp.float32), _ROW_LAYOUT)
    return lax.fori_loop(0, shape.consumer_steps, step, zeros)


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
    """As `skinny_matmul` for 16-bit weights [K, N] or [K, 2, N] that `tiling` fits; norm, bias and residual are cast to
    x's dtype. `interpret`: parameters of Mosaic's interpreter.
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
    operands = {"x": x, "w": w}
    if norm is not None:
        operands["norm"] = norm.astype(x.dtype).reshape(shape.steps, tiling.tile_inputs)
    if bias is not None:
        operands["bias"] = bias.astype(x.dtype).reshape(shape.parts, shape.num_outputs)
    if residual is not None:
        operands["residual"] = residual.astype(x.dtype)
    return _product(operands, shape=shape, interpret=interpret)
