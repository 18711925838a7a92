"""What pieces of a row that is cut leave in memory, and how many of them have come."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from nanovllm_kernels._mosaic import CONSUMER_ROWS
from nanovllm_kernels.rope_paged_decode.mosaic_shape import TILE_COLUMNS, Arrays, KernelShape, Piece

_LAYOUT = plgpu.Layout.WGMMA
_THREADS = 128  # of a warpgroup


def store_rows(target: Any, values: Any, shape: KernelShape) -> None:
    """The first rows of [64, columns], at most 8, to `target` in global memory: one warp has them in registers."""
    count = target.shape[0]
    if shape.interpreted:
        target[...] = values[:count]
        return

    def store(_: Any, target: Any, values: Any) -> None:
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        thread, four = arith.remui(utils.thread_idx(), utils.c(_THREADS, i32)), utils.c(4, i32)
        row = arith.divui(thread, four)
        column = arith.muli(arith.remui(thread, four), utils.c(2, i32))
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, row, utils.c(count, i32))):
            for tile in range(values.shape[1] // TILE_COLUMNS):
                pair = values.registers[(0, tile, *(0,) * (values.registers.ndim - 2))]
                place = row, arith.addi(column, utils.c(tile * TILE_COLUMNS, i32))
                vector.store(pair, target, [arith.index_cast(index, each) for each in place])

    inlined: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT))(store)
    inlined(target, plgpu.layout_cast(values, _LAYOUT))


def leave_part(arrays: Arrays, piece: Piece, values: Any, lse: Any, shape: KernelShape) -> None:
    """Stores a piece's attention, float32 [64, D], and its log-sum-exp, [64]."""
    rows = pl.ds(first_row(piece, piece.ordinal, shape), shape.group)
    store_rows(arrays.parts.at[rows], values, shape)
    store_rows(arrays.lse.at[rows], lax.broadcast_in_dim(lse, (CONSUMER_ROWS, TILE_COLUMNS), [0]), shape)


def first_row(piece: Piece, ordinal: Any, shape: KernelShape) -> Any:
    """Where that piece's query heads lie in `parts` and `lse`, for the KV head of `piece`."""
    return (ordinal * shape.num_kv_heads + piece.head) * shape.group


def arrive(arrays: Arrays, piece: Piece, arrived: Any, shape: KernelShape) -> Any:
    """How many of the row's pieces came here before; if all others, what they left can be read, and the counter is 0.

    `arrived`: a word of shared memory.
    """
    counter = arrays.counters.at[pl.ds(piece.cuts_before * shape.num_kv_heads + piece.head, 1)]
    if shape.interpreted:  # not atomic: programs follow each other there, but the consumers of one do not
        before = counter[0]
        counter[0] = jnp.where(before == piece.count - 1, 0, before + 1)
        return before

    def count(_: Any, counter: Any, arrived: Any, most: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        thread = arith.remui(utils.thread_idx(), utils.c(_THREADS, i32))
        # One piece of code: LLVM may copy a barrier into the branches of a condition, and if the threads of a warp then
        # come to different copies, it lets others through before the word is there. The first barrier orders the
        # warpgroup's stores before the release, the second what it reads after the acquire.
        before = utils.inline_ptx(
            f"""{{
            .reg .pred leads; .reg .b32 before;
            setp.eq.u32 leads, $1, 0;
            bar.sync $2, {_THREADS};
            @leads atom.acq_rel.gpu.global.inc.u32 before, [$3], $5;
            @leads st.shared.u32 [$4], before;
            bar.sync $2, {_THREADS};
            ld.shared.u32 $0, [$4];
            }}""",
            thread,
            utils.warpgroup_barrier_idx(sync=False),
            utils.memref_ptr(counter),
            utils.memref_ptr(arrived),
            most.registers.flat[0],
            result_types=i32,
            has_side_effects=True,
            convergent=True,
        )
        return fragmented_array.FragmentedArray.splat(before, (), is_signed=True)

    scalar = plgpu.Layout.WG_SPLAT(())
    inlined: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), scalar),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar),
    )(count)
    return inlined(counter, arrived, piece.count - 1)
