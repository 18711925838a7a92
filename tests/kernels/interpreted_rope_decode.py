"""Runs the Triton kernels of `rope_paged_decode`, and of `paged_decode` with several queries, in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_rope_decode.py

Prints each case with its error; a subprocess of test_rope_paged_decode.py. Float8 caches need instructions of the GPU.
"""

import sys

import interpreted  # the interpreter, mended for bfloat16
import jax.numpy as jnp
import numpy as np
from interpreted_sample import patch_interpreter
from kernel_oracle import decode_oracle, relative_error

from nanovllm_kernels import lowering_for, rope_cache_write
from nanovllm_kernels._cases import AttentionCase, attention_inputs
from nanovllm_kernels._compat import Target
from nanovllm_kernels.paged_decode import attend
from nanovllm_kernels.paged_decode import triton as attention
from nanovllm_kernels.rope_paged_decode import triton as device
from nanovllm_kernels.rope_paged_decode.cases import rope_paged_decode_inputs
from nanovllm_kernels.rope_paged_decode.reference import newest_slots

# Rows that are empty, of one token, at a block's and a tile's border, and cut.
LENGTHS = (0, 1, 16, 65, 300)
CASES = [
    AttentionCase("bfloat16", LENGTHS, 4, 2, 128),
    AttentionCase("float16", LENGTHS, 3, 1, 64, dtype="float16", block_size=8),
    AttentionCase("multi_head", LENGTHS, 2, 2, 80),
    AttentionCase("window", LENGTHS, 4, 2, 64, sliding_window=100, dtype="float32"),
    AttentionCase("window_of_1", LENGTHS, 2, 1, 32, sliding_window=1, dtype="float32"),
    AttentionCase("soft_cap", LENGTHS, 2, 1, 64, soft_cap=2.0, dtype="float32"),
]
QUERY_CASES = [
    AttentionCase("queries", LENGTHS, 4, 2, 64, num_queries=4, dtype="float32"),
    AttentionCase("their_window", LENGTHS, 3, 1, 64, num_queries=8, sliding_window=40, dtype="float32"),
]
# The interpreter cuts float16 numbers off where a GPU rounds them.
TOLERANCE = {"bfloat16": 5e-3, "float16": 4e-3, "float32": 1e-5}


def update_in_place(launch, *arrays):
    copies = [np.array(array) for array in arrays]
    launch(*copies)
    return tuple(copies)


def run(case, *, in_kernel_merge):
    args, options = rope_paged_decode_inputs(case)
    tables, lens = args[5:]
    write = {name: options.get(name) for name in ("q_norm", "k_norm", "eps")}
    slots = newest_slots(jnp.asarray(tables), lens, case.block_size)
    q, *expected_caches = map(np.asarray, rope_cache_write(*map(jnp.asarray, args[:5]), slots, **write, backend="xla"))
    expected = decode_oracle(q, *expected_caches, tables, lens, **case.options)
    counters = np.zeros(64, np.int32) if in_kernel_merge else None
    # So few multiprocessors that rows fill them: the last program merges, if it has counters.
    with lowering_for(Target(90, 4, 227 * 1024)):
        options = {"q_norm": None, "k_norm": None, "k_scale": None, "v_scale": None} | options
        out, *caches = device.rope_paged_decode_triton(*args, **options, counters=counters)
    error = relative_error(out, expected)
    key_error = relative_error(*(np.nan_to_num(np.asarray(k, np.float64)) for k in (caches[0], expected_caches[0])))
    same = np.array_equal(caches[1].view(np.uint8), expected_caches[1].view(np.uint8))
    clean = counters is None or not counters.any()
    print(f"{case.name:12} {in_kernel_merge=} {error:.1e} {key_error:.1e} {same=} {clean=}", flush=True)
    return max(error, key_error) < TOLERANCE[case.dtype] and same and clean


def run_queries(case):
    inputs = attention_inputs(case)
    options = {"k_scale": None, "v_scale": None, "soft_cap": None, "sliding_window": None} | case.options
    with lowering_for(Target(90, 4, 227 * 1024)):
        out = attention.paged_decode_triton(*inputs.args, **options)
    error = relative_error(out, decode_oracle(*inputs.args, **case.options))
    print(f"{case.name:12} {error:.1e}", flush=True)
    return error < TOLERANCE[case.dtype]


def main():
    patch_interpreter()
    attend.prefetch = lambda pointers: None  # the interpreter knows no instructions of the GPU
    for module in (attention, device):
        module.triton_call, module.update_in_place = interpreted.triton_call, update_in_place
    results = [run(case, in_kernel_merge=merge) for case in CASES for merge in (False, True)]
    results += map(run_queries, QUERY_CASES)
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
