"""The merge of a row's pieces, by the last of them to arrive.

Always in the order of the pieces, whichever arrives last, so that the same bits come out. A warp has a query head and
reads up to 16 pieces before it waits for one: a row of 32,768 tokens among 63 of 300 is cut into 74, of two KV heads.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm

from nanovllm_kernels._integers import ceil_div
from nanovllm_kernels.rope_paged_decode.mosaic_parts import first_row
from nanovllm_kernels.rope_paged_decode.mosaic_shape import TILE_COLUMNS, Arrays, KernelShape, Piece

_WARPS, _LANES = 4, 32  # of a warpgroup, and of a warp
_DIMS = 4  # of a head, 16 bytes, that a lane merges
_BATCH = 16  # pieces that a warp of one query head reads at a time


def merge(arrays: Arrays, piece: Piece, target: Any, shape: KernelShape) -> None:
    """Stores the row's attention for the piece's KV head, [G, D], from what all its pieces left."""
    if shape.interpreted:
        _merge_interpreted(arrays, piece, target, shape)
        return
    scalar, ref = plgpu.Layout.WG_SPLAT(()), plgpu.RefType()
    merged: Any = plgpu.inline_mgpu(arg_types=(ref, ref, ref, scalar, scalar))(functools.partial(_merge, shape))
    merged(arrays.parts, arrays.lse, target, first_row(piece, piece.first, shape), piece.count)


def _merge_interpreted(arrays: Arrays, piece: Piece, target: Any, shape: KernelShape) -> None:
    def add(ordinal: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        acc, maximum, total = state
        rows = pl.ds(first_row(piece, ordinal, shape), shape.group)
        lse = arrays.lse[rows][:, :1]
        new_maximum = jnp.maximum(maximum, lse)
        decay, weight = jnp.exp2(maximum - new_maximum), jnp.exp2(lse - new_maximum)
        return acc * decay + arrays.parts[rows] * weight, new_maximum, total * decay + weight

    column = functools.partial(jnp.full, (shape.group, 1), dtype=jnp.float32)
    state = jnp.zeros((shape.group, shape.head_dim), jnp.float32), column(-jnp.inf), column(0)
    acc, _, total = lax.fori_loop(piece.first, piece.first + piece.count, add, state)
    target[...] = (acc / total).astype(shape.dtype)


def _merge(shape: KernelShape, _: Any, parts: Any, lse: Any, target: Any, first: Any, count: Any) -> None:
    """Each warp has one or two query heads, each lane 4 of a head's dims, and the weight of one piece of a batch.

    `first`: the row of the first piece in `parts` and `lse`.
    """
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    first, count = first.registers.flat[0], count.registers.flat[0]
    thread = arith.remui(utils.thread_idx(), utils.c(_WARPS * _LANES, i32))
    warp, lane = arith.divui(thread, utils.c(_LANES, i32)), arith.remui(thread, utils.c(_LANES, i32))
    turns = ceil_div(shape.group, _WARPS)
    batch = _BATCH // turns
    heads = [arith.addi(warp, utils.c(turn * _WARPS, i32)) for turn in range(turns)]
    last = utils.c(shape.group - 1, i32)
    rows = [arith.addi(first, arith.minui(head, last)) for head in heads]
    stride = shape.num_kv_heads * shape.group
    start = utils.c(0, i32)
    zero, lowest = utils.c(0.0, f32), utils.c(-math.inf, f32)

    def load_batch(begin: Any) -> list[tuple[Any, list[tuple[Any, ...]]]]:
        """Of each head the lane's log-sum-exp and all pieces' values. All loads before anything waits for one."""
        own = arith.addi(begin, arith.remui(lane, utils.c(batch, i32)))
        sums = [_load(lse, row, stride, TILE_COLUMNS, own, count, start, 1, -math.inf)[0] for row in rows]
        pieces = [arith.addi(begin, utils.c(piece, i32)) for piece in range(batch)]
        load = functools.partial(_load, parts, stride=stride, width=shape.head_dim, count=count, offset=lane)
        values = [[load(row=row, piece=piece, number=_DIMS, missing=0.0) for piece in pieces] for row in rows]
        return list(zip(sums, values, strict=True))

    state = [(lowest, zero, [zero] * _DIMS) for _ in rows]
    rounds = arith.divui(arith.addi(count, utils.c(batch - 1, i32)), utils.c(batch, i32))

    @utils.fori(rounds, state)
    def merged(round_: Any, state: Any) -> Any:
        after = []
        loaded = load_batch(arith.muli(round_, utils.c(batch, i32)))
        for (own, values), (maximum, total, acc) in zip(loaded, state, strict=True):
            new_maximum = arith.maximumf(maximum, _over_lanes(own, batch, arith.maximumf))
            decay, weights = (_exp2(arith.subf(each, new_maximum)) for each in (maximum, own))
            total = arith.addf(arith.mulf(total, decay), _over_lanes(weights, batch, arith.addf))
            acc = [arith.mulf(each, decay) for each in acc]
            for piece, value in enumerate(values):
                weight = _from_lane(weights, piece)
                acc = [_multiply_add(x, weight, each) for x, each in zip(value, acc, strict=True)]
            after.append((new_maximum, total, acc))
        return after

    for head, (_, total, acc) in zip(heads, merged.results, strict=True):
        with utils.when(arith.cmpi(arith.CmpIPredicate.ule, head, last)):
            _store(target, shape.head_dim, head, lane, [arith.divf(each, total) for each in acc])


def _load(
    source: Any, row: Any, stride: int, width: int, piece: Any, count: Any, offset: Any, number: int, missing: float
) -> tuple[Any, ...]:
    """`number` of a row's float32 words, from L2, or `missing` from piece `count` on.

    L1 may hold what was there before other programs wrote. A row has `width` words; that of a piece is `stride` rows
    from that of the piece before. `offset`: how many times `number` words lie before.
    """
    words = [f"${word}" for word in range(number)]
    base, row_, piece_, count_, offset_ = (f"${number + operand}" for operand in range(5))
    constant = "0fFF800000" if missing == -math.inf else f"0f{int(missing):08X}"
    kind, into = ("f32", words[0]) if number == 1 else (f"v{number}.f32", f"{{{', '.join(words)}}}")
    return utils.inline_ptx(
        f"{{ .reg .pred present; .reg .b32 row; .reg .b64 at; setp.lt.s32 present, {piece_}, {count_}; "
        f"mad.lo.s32 row, {piece_}, {stride}, {row_}; mad.wide.u32 at, row, {4 * width}, {base}; "
        f"mad.wide.u32 at, {offset_}, {4 * number}, at; {' '.join(f'mov.f32 {word}, {constant};' for word in words)} "
        f"@present ld.relaxed.gpu.global.{kind} {into}, [at]; }}",
        utils.memref_ptr(source),
        row,
        piece,
        count,
        offset,
        result_types=[ir.F32Type.get()] * number,
        has_side_effects=True,
    )


def _store(target: Any, width: int, row: Any, lane: Any, values: list[Any]) -> None:
    """A lane's four words of a row of `width`, to global memory as bfloat16."""
    utils.inline_ptx(
        f"{{ .reg .b32 low, high; .reg .b64 at; mad.wide.u32 at, $1, {2 * width}, $0; "
        f"mad.wide.u32 at, $2, {2 * _DIMS}, at; cvt.rn.bf16x2.f32 low, $4, $3; cvt.rn.bf16x2.f32 high, $6, $5; "
        "st.global.v2.b32 [at], {low, high}; }",
        utils.memref_ptr(target),
        row,
        lane,
        *values,
    )


def _over_lanes(x: Any, lanes: int, add: Any) -> Any:
    """The sum, or what `add` makes, over each `lanes` neighbours: all get the same bits."""
    distance = 1
    while distance < lanes:
        x = add(x, utils.shfl_bfly(x, distance))
        distance *= 2
    return x


def _from_lane(x: Any, lane: int) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    everyone, bits = utils.c(0xFFFFFFFF, i32), arith.bitcast(i32, x)
    word = nvvm.shfl_sync(everyone, bits, utils.c(lane, i32), utils.c(_LANES - 1, i32), nvvm.ShflKind.idx)
    return arith.bitcast(x.type, word)


def _exp2(x: Any) -> Any:
    return utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", x, result_types=x.type)


def _multiply_add(x: Any, y: Any, z: Any) -> Any:
    return utils.inline_ptx("fma.rn.f32 $0, $1, $2, $3;", x, y, z, result_types=x.type)
