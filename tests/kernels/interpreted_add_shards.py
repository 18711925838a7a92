"""Runs `add_shards`'s device code in Triton's interpreter: a process for each shard, over memory that they share.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_add_shards.py SHARDS

Prints each case with its error; a subprocess of test_add_shards.py.
"""

import ctypes
import mmap
import multiprocessing
import sys

import interpreted  # the interpreter, mended for bfloat16
import ml_dtypes
import numpy as np
import triton.language as tl

from nanovllm_kernels import lowering_for
from nanovllm_kernels.add_shards import exchange
from nanovllm_kernels.add_shards import triton as device
from nanovllm_kernels.add_shards.cases import SumCase

# The interpreter takes a millisecond for each line of a program: few programs, each shape twice for both sets of slots.
CASES = [
    SumCase(1, 512, dtype="float16"),
    SumCase(2, 2048),
    SumCase(2, 512, residual=False),
    SumCase(2, 2048, residual=False, dtype="float16"),
    SumCase(1, 1024),
] * 2


def load_quads(at):
    """Stands for the PTX of `quads.load_quads`."""
    return tuple(tl.load(at.to(tl.pointer_type(tl.int32)) + word) for word in range(4))


def store_quads(at, words):
    """Stands for the PTX of `quads.store_quads`."""
    for word in range(4):
        tl.store(at.to(tl.pointer_type(tl.int32)) + word, words[word])


def await_quads(at, stride, rank, words, looks, shards):
    """Stands for the PTX of `quads.await_quads`."""
    found = ()
    for shard in range(int(shards)):
        quad, left = words, int(looks.handle.data.item())
        if shard != int(rank.handle.data.item()):
            quad = load_quads(at + shard * stride)
            while left > 0 and any((word.handle.data == exchange.EMPTY).any() for word in quad):
                quad, left = load_quads(at + shard * stride), left - 1
        found += tuple(quad)
    return found


def shared_buffers(shards):
    """Memory that forked processes share, as arrays of words."""
    words = exchange.buffer_words(shards)
    maps = [mmap.mmap(-1, 4 * words) for _ in range(shards)]
    arrays = [np.frombuffer(each, np.int32) for each in maps]
    for array in arrays:
        array[:] = exchange.EMPTY
        array[-exchange.MAX_PROGRAMS :] = 0
    return arrays


def tables(arrays):
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(array)) for array in arrays]
    return exchange.address_tables(np.array(addresses, np.uint64))


def drawn(case, index, shards):
    """Every shard's part, and the residual; -0, which no slot may be confused by, among them."""
    dtype = np.float16 if case.dtype == "float16" else ml_dtypes.bfloat16
    random = np.random.default_rng(index)
    arrays = random.normal(size=(shards + 1, case.rows, case.width)).astype(dtype)
    arrays[:, :, :3] = -0.0
    return arrays


def add_all(rank, table, shards, failed):
    """What one shard does: all sums, each checked."""
    for index, case in enumerate(CASES):
        arrays, norm = drawn(case, index, shards), None
        if case.residual:
            norm = np.random.default_rng(case.width).normal(size=case.width).astype(arrays.dtype)
        with lowering_for(90):
            got, *passed_on = device.add_shards_triton(arrays[rank], arrays[-1] if case.residual else None, table, norm)
        want = arrays[: shards + case.residual].astype(np.float32).sum(axis=0)
        error = np.abs(got.astype(np.float32) - want).max()
        print(f"shard {rank} {case} {error:.1e}", flush=True)
        if not error < 0.04:  # half a unit in the last place of a bfloat16 of up to 8, and NaN is none
            failed.value += 1
        if passed_on:
            scaled, squares = passed_on
            want, norm = got.astype(np.float32), norm.astype(np.float32)
            failed.value += not np.allclose(scaled.astype(np.float32), want * norm, rtol=2**-7)
            failed.value += not np.allclose(squares[:, : case.rows].sum(axis=0), (want * want).sum(axis=1), rtol=1e-5)


def main():
    device.triton_call = interpreted.triton_call
    device.load_quads, device.store_quads, device.await_quads = load_quads, store_quads, await_quads
    shards = int(sys.argv[1])
    arrays = shared_buffers(shards)
    device.MAX_LOOKS = 100_000
    fork = multiprocessing.get_context("fork")
    failed = fork.Value("i", 0)
    processes = [fork.Process(target=add_all, args=(*each, shards, failed)) for each in enumerate(tables(arrays))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    words = np.stack(arrays)
    emptied = bool((words[:, : -exchange.MAX_PROGRAMS] == exchange.EMPTY).all())
    print(f"{emptied=}")
    sys.exit(failed.value != 0 or not emptied or any(process.exitcode for process in processes) or not alone(shards))


def alone(shards):
    """A shard whose peers never come ends, with NaN, and so do its later sums, without waiting."""
    arrays = shared_buffers(shards)
    table, ones = tables(arrays)[0], np.ones((1, 512), ml_dtypes.bfloat16)
    device.MAX_LOOKS = 3
    with lowering_for(90):
        (first,) = device.add_shards_triton(ones, ones, table)
        arrays[0][: -exchange.MAX_PROGRAMS] = 0  # its peers' parts, too late
        (second,) = device.add_shards_triton(ones, ones, table)
    nan = [bool(np.isnan(each.astype(np.float32)).all()) for each in (first, second)]
    print(f"alone: {nan=}")
    return all(nan)


if __name__ == "__main__":
    main()
