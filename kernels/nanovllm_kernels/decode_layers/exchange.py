"""Numbers passed between running programs: each travels with a number that tells readers when it is there.

A word of 64 bits holds a float32 and the number of the layer that sent it (`call`). It is written and read whole, so a
reader needs no fence, counter or barrier: it reads until all its words are that layer's, as in NCCL's low-latency
protocol (https://github.com/NVIDIA/nccl/blob/master/src/device/prims_ll.h). Reads are volatile, which keeps them out of
the L1 cache. They are bounded: a reader that gives up sets a flag and goes on, and what the step made is then thrown
away by whoever reads the flag.
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
def read_flag(failed_ptr, THREADS: tl.constexpr):
    """What each thread sees of the flag that a program has given up."""
    return tl.load(failed_ptr + tl.arange(0, THREADS) * 0, volatile=True)


@triton.jit
@no_type_check
def reads_before_giving_up(flags):
    """None where a program has given up already. The same for all threads of a program, which wait together."""
    return tl.where(tl.max(flags) == 0, _MOST_READS, 0)


@triton.jit
@no_type_check
def send(pointers, values, call, mask):
    """Stores float32 `values`."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & _LOW
    tl.store(pointers, (tl.cast(call, tl.int64) << 32) | bits, mask=mask)


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
def spread(pointers, mask, THREADS: tl.constexpr):
    """Pointers and mask [N, copies]: each word so often that no two threads have the same element.

    Of a tile of fewer elements than threads, several threads hold the same element, and each reads its word for
    itself, at a time of its own. But only one of them is asked whether it is there.
    """
    COPIES: tl.constexpr = THREADS // pointers.numel
    pointers = tl.broadcast_to(tl.reshape(pointers, [pointers.numel, 1]), [pointers.numel, COPIES])
    return pointers, tl.broadcast_to(tl.reshape(mask, [mask.numel, 1]), [mask.numel, COPIES])


@triton.jit
@no_type_check
def receive(pointers, call, mask, failed_ptr, most_reads, THREADS: tl.constexpr):
    """The values at `pointers`, once they have been sent; zero where masked. THREADS are those of a program."""
    if pointers.numel < THREADS:
        asked, asked_mask = spread(pointers, mask, THREADS)
    else:
        asked, asked_mask = pointers, mask
    words = tl.load(asked, mask=asked_mask, other=0, volatile=True)
    late = any_late(words, call, asked_mask)
    reads = 0
    while (late > 0) & (reads < most_reads):
        words = tl.load(asked, mask=asked_mask, other=0, volatile=True)
        late = any_late(words, call, asked_mask)
        reads += 1
    if late > 0:
        tl.store(failed_ptr, 1)
    if pointers.numel < THREADS:
        words = tl.reshape(tl.max(words, 1), pointers.shape)  # all copies are equal
    return values_of(words, mask)


@triton.jit
@no_type_check
def receive_both(first_ptrs, first_mask, second_ptrs, second_mask, call, failed_ptr, most_reads, THREADS: tl.constexpr):
    """Two tiles of values, read at the same time. The first one has an element or more for each thread."""
    tl.static_assert(first_ptrs.numel >= THREADS)
    if second_ptrs.numel < THREADS:
        asked, asked_mask = spread(second_ptrs, second_mask, THREADS)
    else:
        asked, asked_mask = second_ptrs, second_mask
    first = tl.load(first_ptrs, mask=first_mask, other=0, volatile=True)
    second = tl.load(asked, mask=asked_mask, other=0, volatile=True)
    late = any_late(first, call, first_mask) + any_late(second, call, asked_mask)
    reads = 0
    while (late > 0) & (reads < most_reads):
        first = tl.load(first_ptrs, mask=first_mask, other=0, volatile=True)
        second = tl.load(asked, mask=asked_mask, other=0, volatile=True)
        late = any_late(first, call, first_mask) + any_late(second, call, asked_mask)
        reads += 1
    if late > 0:
        tl.store(failed_ptr, 1)
    if second_ptrs.numel < THREADS:
        second = tl.reshape(tl.max(second, 1), second_ptrs.shape)
    return values_of(first, first_mask), values_of(second, second_mask)
