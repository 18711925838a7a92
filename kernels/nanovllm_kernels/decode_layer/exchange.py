"""Numbers passed between running programs: each travels with the call's number, so that readers see when it is there.

A word of 64 bits holds a float32 and the number of the call that sent it. It is written and read whole, so a reader
needs no fence, counter or barrier: it reads until all words are this call's (the low-latency protocol of NCCL). The wait
is bounded: a reader that gives up sets a flag and goes on, and what the step made is then thrown away by whoever reads
the flag.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

# Reads of some 0.7 us before a reader gives up: about 0.1 s, where a layer takes 20 us.
_MOST_READS = tl.constexpr(1 << 17)
_LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
@no_type_check
def send(words_ptr, offsets, values, call, mask):
    """Stores float32 `values` at `offsets` of the words."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & _LOW
    tl.store(words_ptr + offsets, (call.to(tl.int64) << 32) | bits, mask=mask)


@triton.jit
@no_type_check
def late_words(words, call, mask):
    """How many of the words that the mask asks for are not this call's; more or less, but 0 only if none is."""
    return tl.max(tl.where(mask & ((words >> 32) != call), 1, 0))


@triton.jit
@no_type_check
def values_of(words, mask):
    """The float32 values that words hold; zero where masked."""
    return tl.where(mask, (words & _LOW).to(tl.int32).to(tl.float32, bitcast=True), 0.0)


@triton.jit
@no_type_check
def receive(words_ptr, offsets, call, mask, failed_ptr):
    """The float32 values at `offsets`, once they have been sent; zero where masked."""
    pointers = words_ptr + offsets
    words = tl.load(pointers, mask=mask, other=0, volatile=True)
    late = late_words(words, call, mask)
    reads = 1
    while (late > 0) & (reads < _MOST_READS):
        words = tl.load(pointers, mask=mask, other=0, volatile=True)
        late = late_words(words, call, mask)
        reads += 1
    if late > 0:
        tl.store(failed_ptr, 1)
    return values_of(words, mask)


@triton.jit
@no_type_check
def receive_both(first_ptrs, first_mask, second_ptrs, second_mask, call, failed_ptr):
    """Two tiles of values, read at the same time."""
    first = tl.load(first_ptrs, mask=first_mask, other=0, volatile=True)
    second = tl.load(second_ptrs, mask=second_mask, other=0, volatile=True)
    late = late_words(first, call, first_mask) + late_words(second, call, second_mask)
    reads = 1
    while (late > 0) & (reads < _MOST_READS):
        first = tl.load(first_ptrs, mask=first_mask, other=0, volatile=True)
        second = tl.load(second_ptrs, mask=second_mask, other=0, volatile=True)
        late = late_words(first, call, first_mask) + late_words(second, call, second_mask)
        reads += 1
    if late > 0:
        tl.store(failed_ptr, 1)
    return values_of(first, first_mask), values_of(second, second_mask)
