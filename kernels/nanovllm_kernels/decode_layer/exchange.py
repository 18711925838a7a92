"""Numbers passed between running programs: each travels with the call's number, so that readers see when it is there.

A word of 64 bits holds a float32 and the number of the call that sent it. It is written and read whole, so a reader
needs no fence, counter or barrier: it reads until all its words are this call's, as in NCCL's low-latency protocol
(https://github.com/NVIDIA/nccl/blob/master/src/device/prims_ll.h). Reads are volatile, which keeps them out of the L1
cache. They are bounded: a reader that gives up sets a flag and goes on, and what the step made is then thrown away by
whoever reads the flag.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

# Reads of some 0.7 us before a reader gives up: about 0.1 s, where a layer takes 30 us.
_MOST_READS = tl.constexpr(1 << 17)
_LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
@no_type_check
def reads_before_giving_up(failed_ptr):
    """None where an earlier call has given up already."""
    return tl.where(tl.load(failed_ptr) == 0, _MOST_READS, 0)


@triton.jit
@no_type_check
def send(pointers, values, call, mask):
    """Stores float32 `values`."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & _LOW
    tl.store(pointers, (call.to(tl.int64) << 32) | bits, mask=mask)


@triton.jit
@no_type_check
def any_late(words, call, mask):
    """1 if a word that the mask asks for is not this call's yet, else 0."""
    return tl.max(tl.where(mask & ((words >> 32) != call), 1, 0))


@triton.jit
@no_type_check
def values_of(words, mask):
    """The float32 values that words hold; zero where masked."""
    return tl.where(mask, (words & _LOW).to(tl.int32).to(tl.float32, bitcast=True), 0.0)


@triton.jit
@no_type_check
def receive(pointers, call, mask, failed_ptr, most_reads):
    """The values at `pointers`, once they have been sent; zero where masked."""
    words = tl.load(pointers, mask=mask, other=0, volatile=True)
    late = any_late(words, call, mask)
    reads = 0
    while (late > 0) & (reads < most_reads):
        words = tl.load(pointers, mask=mask, other=0, volatile=True)
        late = any_late(words, call, mask)
        reads += 1
    if late > 0:
        tl.store(failed_ptr, 1)
    return values_of(words, mask)


@triton.jit
@no_type_check
def receive_both(first_ptrs, first_mask, second_ptrs, second_mask, call, failed_ptr, most_reads):
    """Two tiles of values, read at the same time."""
    first = tl.load(first_ptrs, mask=first_mask, other=0, volatile=True)
    second = tl.load(second_ptrs, mask=second_mask, other=0, volatile=True)
    late = any_late(first, call, first_mask) + any_late(second, call, second_mask)
    reads = 0
    while (late > 0) & (reads < most_reads):
        first = tl.load(first_ptrs, mask=first_mask, other=0, volatile=True)
        second = tl.load(second_ptrs, mask=second_mask, other=0, volatile=True)
        late = any_late(first, call, first_mask) + any_late(second, call, second_mask)
        reads += 1
    if late > 0:
        tl.store(failed_ptr, 1)
    return values_of(first, first_mask), values_of(second, second_mask)
