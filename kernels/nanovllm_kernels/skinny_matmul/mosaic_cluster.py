"""Device code of the Mosaic implementation: sums of the programs of a cluster, which share out the columns of a tile.

Each sends the others their columns, from registers into their shared memory, and adds to its own what they send. Every
thread writes what the thread of the same number reads, 16 bytes at a time, so no matrix has to be laid out.

Values and scalars of a kernel have no Python type that says more than Any.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float

from nanovllm_kernels._mosaic import CONSUMER_ROWS, CONSUMERS
from nanovllm_kernels.skinny_matmul.mosaic_shape import ProductShape

_THREADS = 128  # of a warpgroup
# A thread of a warpgroup holds four sums of each 8 columns: of two rows and two columns.
_GROUP_COLS, _GROUP_BYTES = 8, 16 * _THREADS
_CONSUMERS_MEET = 8  # a barrier whose number Mosaic does not use

_SUMS = plgpu.Layout.WGMMA


def leave_halves(sums: Float[Array, "rows cols"], scratch: Any, shape: ProductShape, consumer: Any) -> None:
    """Of consumers that divide the inputs: the first leaves to the second what goes to others, and gets the rest."""

    def leave(_: Any, references: Any, consumer: Any, sums: Any) -> None:
        (halves,) = references
        rank, address = _rank(), _address(halves)
        is_second = _equal(consumer.registers.flat[0], 1)
        for program, groups in enumerate(_columns(sums, shape)):
            with utils.when(arith.cmpi(arith.CmpIPredicate.eq, _equal(rank, program), is_second)):
                _store("st.shared", address, program * _slice_bytes(shape), groups)
        _do(f"bar.sync {_CONSUMERS_MEET}, {CONSUMERS * _THREADS};", convergent=True)

    _inline(leave, [scratch["halves"]], consumer, sums)


def send_columns(sums: Float[Array, "rows cols"], scratch: Any, shape: ProductShape, consumer: Any) -> None:
    """Each other program gets its columns of a consumer's sums, or of both consumers' where they divide the inputs."""
    divided = shape.tiling.splits_inputs
    references = [scratch["inbox"], *([scratch["halves"]] if divided else [])]

    def send(_: Any, references: Any, consumer: Any, sums: Any) -> None:
        rank, splits, size = _rank(), shape.tiling.splits, _slice_bytes(shape)
        inbox = _inbox_address(references[0], consumer, shape)
        for program, groups in enumerate(_columns(sums, shape)):
            with utils.when(_equal(rank, program, negated=True)):
                if divided:
                    groups = _plus(groups, _address(references[1]), program * size)
                # The receiver has a place for each of the others, by how far before them it is.
                place = arith.remui(arith.addi(rank, _word(splits - program - 1)), _word(splits))
                here = arith.addi(inbox, arith.muli(place, _word(_inbox_bytes(shape))))
                there = utils.inline_ptx(
                    "mapa.shared::cluster.u32 $0, $1, $2;", here, _word(program), result_types=_i32()
                )
                _store("st.shared::cluster", there, 0, groups)
        _do("barrier.cluster.arrive.release.aligned;", convergent=True)

    _inline(send, references, consumer, sums)


def collect_columns(
    sums: Float[Array, "rows cols"], scratch: Any, shape: ProductShape, consumer: Any
) -> Float[Array, "rows own_cols"]:
    """The totals of this program's columns, added in a fixed order, when all warps of the cluster have sent theirs."""
    divided = shape.tiling.splits_inputs
    references = [scratch["inbox"], *([scratch["halves"]] if divided else [])]
    total_type = plgpu.ShapeDtypeStruct((CONSUMER_ROWS, shape.own_cols), jnp.float32, layout=_SUMS)

    def collect(_: Any, references: Any, consumer: Any, sums: Any) -> Any:
        rank = _rank()
        total = _chosen(_columns(sums, shape), rank)
        if divided:
            _do("barrier.cluster.arrive.relaxed.aligned;", convergent=True)  # the other consumer has sent
            own_half = arith.addi(_address(references[1]), arith.muli(rank, _word(_slice_bytes(shape))))
            total = _plus(total, own_half, 0)
        _do("barrier.cluster.wait.acquire.aligned;", convergent=True)
        for place in range(shape.tiling.splits - 1):
            total = _plus(total, _inbox_address(references[0], consumer, shape), place * _inbox_bytes(shape))
        pairs = [_pair(group[first : first + 2]) for group in total for first in (0, 2)]
        registers = np.empty(len(pairs), dtype=object)
        registers[:] = pairs
        layout = _SUMS.to_mgpu()
        return fragmented_array.FragmentedArray(
            _registers=registers.reshape(layout.registers_shape(total_type.shape)), _layout=layout, _is_signed=None
        )

    return _inline(collect, references, consumer, sums, total_type)


def _inline(code: Any, references: list[Any], consumer: Any, sums: Any, return_type: Any = None) -> Any:
    types = [plgpu.RefType()] * len(references), plgpu.Layout.WG_SPLAT(()), _SUMS
    inlined: Any = plgpu.inline_mgpu(arg_types=types, return_type=return_type)(code)
    return inlined(references, consumer, sums)


def _slice_bytes(shape: ProductShape) -> int:
    """Of one consumer's sums of a program's columns."""
    return shape.own_cols // _GROUP_COLS * _GROUP_BYTES


def _inbox_bytes(shape: ProductShape) -> int:
    """What one program sends to another."""
    return _slice_bytes(shape) * (1 if shape.tiling.splits_inputs else CONSUMERS)


def _columns(sums: Any, shape: ProductShape) -> list[list[list[Any]]]:
    """For each program of the cluster, four sums of each group of its columns."""
    at = lambda pair, i: vector.extract(  # noqa: E731
        pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
    )
    pairs = list(sums.registers.flatten())
    groups = [[at(pair, i) for pair in pairs[first : first + 2] for i in (0, 1)] for first in range(0, len(pairs), 2)]
    each = shape.own_cols // _GROUP_COLS
    return [groups[first : first + each] for first in range(0, len(groups), each)]


def _chosen(columns: list[list[list[Any]]], rank: Any) -> list[list[Any]]:
    """Those of the program with this rank."""
    chosen = columns[0]
    for program, its in enumerate(columns[1:], 1):
        here = _equal(rank, program)
        chosen = [
            [arith.select(here, new, old) for new, old in zip(*groups, strict=True)]
            for groups in zip(its, chosen, strict=True)
        ]
    return chosen


def _plus(groups: list[list[Any]], address: Any, offset: int) -> list[list[Any]]:
    """With the sums added that lie at an address."""
    totals = []
    for number, group in enumerate(groups):
        four = utils.inline_ptx(
            f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{offset + number * _GROUP_BYTES}];",
            address,
            result_types=[ir.F32Type.get()] * len(group),
            has_side_effects=True,
        )
        totals.append([arith.addf(one, other) for one, other in zip(group, four, strict=True)])
    return totals


def _store(instruction: str, address: Any, offset: int, groups: list[list[Any]]) -> None:
    for number, group in enumerate(groups):
        _do(f"{instruction}.v4.f32 [$0+{offset + number * _GROUP_BYTES}], {{$1, $2, $3, $4}};", address, *group)


def _do(ptx: str, *operands: Any, convergent: bool = False) -> None:
    utils.inline_ptx(ptx, *operands, has_side_effects=True, convergent=convergent)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _word(number: int) -> Any:
    return utils.c(number, _i32())


def _rank() -> Any:
    return utils.inline_ptx("mov.u32 $0, %cluster_ctarank;", result_types=_i32())


def _equal(word: Any, number: int, *, negated: bool = False) -> Any:
    return arith.cmpi(arith.CmpIPredicate.ne if negated else arith.CmpIPredicate.eq, word, _word(number))


def _address(buffer: Any) -> Any:
    """Where the first four numbers of a thread lie in a buffer."""
    thread = arith.remui(utils.thread_idx(), _word(_THREADS))
    return utils.inline_ptx("mad.lo.u32 $0, $1, 16, $2;", thread, utils.memref_ptr(buffer), result_types=_i32())


def _inbox_address(inbox: Any, consumer: Any, shape: ProductShape) -> Any:
    if shape.tiling.splits_inputs:
        return _address(inbox)
    return arith.addi(_address(inbox), arith.muli(consumer.registers.flat[0], _word(_slice_bytes(shape))))


def _pair(two: list[Any]) -> Any:
    pair = llvm.mlir_undef(ir.VectorType.get((2,), ir.F32Type.get()))
    for position, number in enumerate(two):
        pair = llvm.insertelement(pair, number, position=_word(position))
    return pair
