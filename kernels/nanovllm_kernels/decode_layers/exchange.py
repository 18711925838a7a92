"""Numbers passed between running programs: each is there as soon as its word is not zero.

The words of all layers are zero when the kernel starts, and each is written once, whole. So a reader needs no fence,
counter or barrier: it reads until none of its words is zero. A zero is sent as -0.0. NCCL's low-latency protocol
(https://github.com/NVIDIA/nccl/blob/master/src/device/prims_ll.h) has a flag beside each number instead, for words
to be used again, and so twice the bytes, which all programs read. Reads are volatile, which keeps them out of the L1
cache. They are bounded: a reader that gives up sets a flag and goes on, and what the step made is then thrown away by
whoever reads the flag.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

# Reads of some 0.7 us before a reader gives up: about 0.1 s, where a layer takes 25 us.
_MOST_READS = tl.constexpr(1 << 17)
_MINUS_ZERO = tl.constexpr(-(1 << 31))


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
def send(pointers, values, mask):
    """Stores float32 `values`."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True)
    tl.store(pointers, tl.where(bits == 0, _MINUS_ZERO, bits), mask=mask)


@triton.jit
@no_type_check
def read_words(pointers, mask):
    """Words as they are now, zero if not there yet; 1 where masked."""
    return tl.load(pointers, mask=mask, other=1, volatile=True)


@triton.jit
@no_type_check
def any_late(words):
    """1 if one of the words is not there yet, else 0."""
    return tl.max((words == 0).to(tl.int32))


@triton.jit
@no_type_check
def values_of(words, mask):
    """The float32 values that words hold; zero where masked."""
    return tl.where(mask, words.to(tl.float32, bitcast=True), 0.0)


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
def receive(pointers, mask, failed_ptr, most_reads, THREADS: tl.constexpr):
    """The values at `pointers`, once they have been sent; zero where masked. THREADS are those of a program."""
    if pointers.numel < THREADS:
        asked, asked_mask = spread(pointers, mask, THREADS)
    else:
        asked, asked_mask = pointers, mask
    words = read_words(asked, asked_mask)
    late = any_late(words)
    reads = 0
    while (late > 0) & (reads < most_reads):
        words = read_words(asked, asked_mask)
        late = any_late(words)
        reads += 1
    if late > 0:
        tl.store(failed_ptr, 1)
    if pointers.numel < THREADS:
        words = tl.reshape(tl.max(words, 1), pointers.shape)  # all copies are equal
    return values_of(words, mask)


@triton.jit
@no_type_check
def receive_both(first_ptrs, first_mask, second_ptrs, second_mask, failed_ptr, most_reads, THREADS: tl.constexpr):
    """Two tiles of values, read at the same time. The first one has an element or more for each thread."""
    tl.static_assert(first_ptrs.numel >= THREADS)
    if second_ptrs.numel < THREADS:
        asked, asked_mask = spread(second_ptrs, second_mask, THREADS)
    else:
        asked, asked_mask = second_ptrs, second_mask
    first, second = read_words(first_ptrs, first_mask), read_words(asked, asked_mask)
    late = any_late(first) + any_late(second)
    reads = 0
    while (late > 0) & (reads < most_reads):
        first, second = read_words(first_ptrs, first_mask), read_words(asked, asked_mask)
        late = any_late(first) + any_late(second)
        reads += 1
    if late > 0:
        tl.store(failed_ptr, 1)
    if second_ptrs.numel < THREADS:
        second = tl.reshape(tl.max(second, 1), second_ptrs.shape)
    return values_of(first, first_mask), values_of(second, second_mask)
