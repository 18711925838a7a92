"""Runs `decode_layer`'s device code in Triton's interpreter, each phase as a launch of its own.

The interpreter runs one program after the other, so none could wait for another. `python
tests/kernels/interpreted_layer.py` prints each case with its error; a subprocess of test_decode_layer.py.
"""

import sys
from dataclasses import replace

import interpreted  # asks for the interpreter, and mends it
import jax
import numpy as np
from kernel_oracle import relative_error

from triton.runtime import interpreter

from nanovllm_kernels import lowering_for
from nanovllm_kernels.decode_layer import triton as device
from nanovllm_kernels.decode_layer.cases import LayerCase, layer_inputs
from nanovllm_kernels.decode_layer.launch import Launch
from nanovllm_kernels.decode_layer.reference import decode_layer_xla

# The interpreter's scalars are arrays of one element, which NumPy does not take for integers.
patch_tensor = interpreter._patch_lang_tensor


def patch_tensor_and_index(tensor, scope):
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = patch_tensor_and_index

LAUNCH = Launch(
    programs=6,
    tile_rows=16,
    slices=4,
    num_warps=4,
    tile_tokens=16,
    stages=1,
    tile_inputs=64,
    most_cols=32,
    most_pieces=3,
    read_ahead=0,
)
ONE_ROW = replace(LAUNCH, tile_rows=1, slices=1)
SMALL = {"width": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp": 104, "block_size": 8}
PROBLEMS = [
    (LayerCase("one_row", (37,), **SMALL), ONE_ROW),
    (LayerCase("one_row_window", (37,), **SMALL, sliding_window=9), ONE_ROW),
    (LayerCase("one_row_bias", (33,), **SMALL, qk_norm=False, qkv_bias=True), ONE_ROW),
    (LayerCase("one_short", (1,), **SMALL), replace(ONE_ROW, tile_inputs=32)),
    (LayerCase("many_programs", (90,), **SMALL), replace(ONE_ROW, programs=40, most_pieces=16)),
    (LayerCase("rows", (5, 0, 60, 1, 16), **SMALL), LAUNCH),
    (LayerCase("rows_2", (5, 0, 60, 1, 17), **SMALL), replace(LAUNCH, programs=40, tile_inputs=32)),
    (LayerCase("window", (40, 3), **SMALL, sliding_window=9), LAUNCH),
    (LayerCase("bias", (21, 33), **SMALL, qk_norm=False, qkv_bias=True), LAUNCH),
]


def triton_call(*args, kernel, out_type, FIRST, LAST, **options):
    """The phases one after the other, each with the results of those before."""
    outputs = interpreted.triton_call(*args, kernel=kernel, out_type=out_type, FIRST=9, LAST=9, **options)
    tree = jax.tree.structure(out_type)
    leaves = jax.tree.leaves(outputs)
    for phase in range(FIRST, LAST + 1):
        interpreted.triton_call(*args, *leaves, kernel=kernel, out_type=(), FIRST=phase, LAST=phase, **options)
    return jax.tree.unflatten(tree, leaves)


def run(case, launch):
    device.triton_call = triton_call
    device.update_in_place = lambda call, *arrays: (call(*arrays), arrays)[1]
    x, weights, cos, sin, k_cache, v_cache, tables, lens = layer_inputs(case)
    expected = jax.jit(lambda *args: decode_layer_xla(*args, **case.options))(
        x, weights, cos, sin, k_cache, v_cache, tables, lens
    )
    words = np.zeros(1 << 14, np.int32)
    k_cache, v_cache = np.array(k_cache), np.array(v_cache)
    with lowering_for(90):
        got = device.decode_layer_triton(
            x, weights, cos, sin, k_cache, v_cache, tables, lens, **case.options, words=words, call=np.array(3, np.int32), next_qkv=None,
            launch=launch,
        )
    active = lens > 0
    got = [np.asarray(array, np.float32) for array in got]
    expected = [np.asarray(array, np.float32) for array in expected]
    error = relative_error(np.asarray(got[0])[active], np.asarray(expected[0])[active])
    caches = [
        relative_error(np.nan_to_num(np.asarray(a, np.float32)), np.nan_to_num(np.asarray(b, np.float32)))
        for a, b in zip(got[1:], expected[1:], strict=True)
    ]
    same = all(
        np.array_equal(np.isnan(np.asarray(a, np.float32)), np.isnan(np.asarray(b, np.float32)))
        for a, b in zip(got[1:], expected[1:], strict=True)
    )
    # A single row's words stay where they are, for the next call's number tells them apart.
    left = words[:8] if len(lens) == 1 else words
    print(f"{case.name:14} {launch} {error:.1e} {caches} {same=} {left.any()=}", flush=True)
    return error < 1e-2 and max(caches) < 1e-2 and same and not left.any()


def main():
    sys.exit(not all([run(case, launch) for case, launch in PROBLEMS]))


if __name__ == "__main__":
    main()
