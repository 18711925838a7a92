"""Programs of one kernel that wait for each other: a barrier over the whole grid.

A barrier is a counter in global memory that every program adds to when its results are stored (release) and reads until
all have (acquire), as in cooperative groups. It works only if all programs are resident at once. The wait is bounded:
a program that gives up sets a flag and goes on, and what the step made is then thrown away by whoever reads the flag.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

# Polls of some 0.7 us before a program gives up: about 0.1 s, where a layer takes 20 us.
_MOST_POLLS = tl.constexpr(1 << 17)


@triton.jit
@no_type_check
def arrive(counter_ptr):
    """Tells the others that all that this program stored so far can be read."""
    # The barrier orders the other threads' stores before the release of the one that adds.
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first red.release.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l",
        [counter_ptr.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
@no_type_check
def wait_for(counter_ptr, failed_ptr, arrivals):
    """Waits until `arrivals` programs have arrived. What they stored must be read past L1, which may hold older values."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred leave;
        .reg .b32 thread, seen, polls;
        mov.u32 $0, 0;
        mov.u32 thread, %tid.x;
        setp.ne.u32 leave, thread, 0;
        @leave bra DONE;
        mov.u32 polls, 0;
        POLL:
        ld.acquire.gpu.global.u32 seen, [$1];
        setp.ge.u32 leave, seen, $3;
        @leave bra DONE;
        add.u32 polls, polls, 1;
        setp.lt.u32 leave, polls, $4;
        @leave bra POLL;
        red.relaxed.gpu.global.or.b32 [$2], 1;
        DONE:
        }""",
        "=r,l,l,r,r",
        [counter_ptr.to(tl.int64), failed_ptr.to(tl.int64), arrivals, _MOST_POLLS],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()
