"""Words of memory by which one program of the Mosaic kernel tells another that its sums are there."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

# Of the waiting program's polls, some 0.5 us each: it fails after a second instead of waiting for ever.
_MOST_POLLS = 1 << 21


def _inline(code: Any, word: Any) -> None:
    inlined: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(code)
    inlined(word)


def announce_help(word: Any, *, interpreted: bool) -> None:
    """After the warpgroup's stores: whoever finds 1 in the word can read them."""
    if interpreted:
        word[0] = 1
        return

    def announce(_: Any, word: Any) -> None:
        utils.warpgroup_barrier()  # orders all stores of the warpgroup before the release
        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            one = utils.c(1, ir.IntegerType.get_signless(32))
            utils.inline_ptx("st.release.gpu.global.u32 [$0], $1;", utils.memref_ptr(word), one, has_side_effects=True)

    _inline(announce, word)


def wait_for_help(word: Any, *, interpreted: bool) -> None:
    """Until the word is 1, which is set back to 0; copies that the warpgroup then asks for see what was announced."""
    if interpreted:  # there programs follow each other
        word[0] = 0
        return

    def wait(_: Any, word: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        pointer, zero = utils.memref_ptr(word), utils.c(0, i32)
        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            loop = scf.WhileOp([i32, i32], [utils.c(_MOST_POLLS, i32)])
            before = loop.before.blocks.append(i32)
            with ir.InsertionPoint.at_block_begin(before):
                (left,) = before.arguments
                found = utils.inline_ptx(
                    "ld.acquire.gpu.global.u32 $0, [$1];", pointer, result_types=i32, has_side_effects=True
                )
                is_absent = arith.cmpi(arith.CmpIPredicate.eq, found, zero)
                goes_on = arith.andi(is_absent, arith.cmpi(arith.CmpIPredicate.ne, left, zero))
                scf.condition(goes_on, [arith.subi(left, utils.c(1, i32)), found])
            after = loop.after.blocks.append(i32, i32)
            with ir.InsertionPoint.at_block_begin(after):
                scf.yield_([after.arguments[0]])
            utils.inline_ptx("{ .reg .pred p; setp.eq.u32 p, $0, 0; @p trap; }", loop.results[1], has_side_effects=True)
            utils.inline_ptx("st.global.u32 [$0], $1;", pointer, zero, has_side_effects=True)
            # TMA, which reads next, is another proxy than the loads and stores that the word orders.
            utils.inline_ptx("fence.proxy.async;", has_side_effects=True)
        utils.warpgroup_barrier()

    _inline(wait, word)
