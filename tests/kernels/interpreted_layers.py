"""Runs `decode_layers`'s device code in Triton's interpreter, each phase as a launch of its own.

The interpreter runs one program after the other, so none could wait for another. `python
tests/kernels/interpreted_layers.py` prints each case with its error; a subprocess of test_decode_layers.py.
"""

import sys
from dataclasses import replace

import interpreted  # asks for the interpreter, and mends it
import jax
import numpy as np
from kernel_oracle import layers_oracle, relative_error
from triton.runtime import interpreter

from nanovllm_kernels import lowering_for
from nanovllm_kernels.decode_layers import triton as device
from nanovllm_kernels.decode_layers.cases import LayerCase, layer_inputs
from nanovllm_kernels.decode_layers.launch import Launch

# The interpreter's scalars are arrays of one element, which NumPy does not take for integers.
patch_tensor = interpreter._patch_lang_tensor


def patch_tensor_and_index(tensor, scope):
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = patch_tensor_and_index

LAUNCH = Launch(programs=24, num_warps=4, tile_tokens=16, num_stages=1, most_pieces=8)
SMALL = {"width": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp": 104, "block_size": 8, "num_layers": 1}
PROBLEMS = [
    (LayerCase("small", 37, **SMALL | {"num_layers": 3}), LAUNCH),  # a layer takes some 2 s
    (LayerCase("first_token", 1, **SMALL), LAUNCH),
    (LayerCase("whole_tile", 17, **SMALL), LAUNCH),
    (LayerCase("tiles_a_piece", 150, **SMALL), replace(LAUNCH, most_pieces=3)),
    (LayerCase("padding", 0, **SMALL), LAUNCH),
    (LayerCase("window", 37, **SMALL, sliding_window=9), LAUNCH),
    (LayerCase("bias", 33, **SMALL, qk_norm=False, qkv_bias=True), LAUNCH),
    (LayerCase("splits", 40, 64, 8, 2, 64, 520, num_layers=1), LAUNCH),
    (
        LayerCase("splits_inside_heads", 40, 64, 14, 2, 64, 776, qk_norm=False, num_layers=1),
        replace(LAUNCH, programs=40),
    ),
]


def triton_call(*args, kernel, out_type, FIRST, LAST, **options):
    """The layers one after the other and of each the phases, each with what those before sent and stored."""
    *arrays, begin_layer, end_layer = args
    out = np.full(out_type.shape, np.nan, out_type.dtype)
    options |= {"kernel": kernel, "out_type": ()}
    for layer in range(begin_layer, end_layer):
        for phase in range(FIRST, LAST):
            interpreted.triton_call(*arrays, layer, layer + 1, out, FIRST=phase, LAST=phase, **options)
    interpreted.triton_call(*arrays, end_layer, end_layer, out, FIRST=LAST, LAST=LAST, **options)
    return out


def update_in_place(call, *arrays):
    arrays = [np.array(array) for array in arrays]
    call(*arrays)
    return arrays


def run(case, launch, most_layers=device.MOST_LAYERS):
    device.MOST_LAYERS = most_layers
    device.triton_call, device.update_in_place = triton_call, update_in_place
    x, layers, cos, sin, caches, tables, lens = layer_inputs(case)
    expected = layers_oracle(x, layers, cos, sin, caches, tables, lens, **case.options)
    assert device.tilings(launch, layers[0]).fit(launch.programs)
    with lowering_for(90):
        got = device.decode_layers_triton(x, layers, cos, sin, caches, tables, lens, **case.options, launch=launch)
    error = relative_error(got[0], expected[0])
    pairs = zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True)
    written = max(relative_error(*seen_slots(a, b)) for a, b in pairs)
    print(f"{case.name:20} {error:.1e} {written:.1e}", flush=True)
    return error < 1e-2 and written < 1e-2


def seen_slots(got, expected):
    """A cache with zeros in unused slots, which hold NaN; other slots that hold NaN stay."""
    unused = np.isnan(expected)
    got = np.asarray(got, np.float64)
    return np.where(unused & np.isnan(got), 0, got), np.where(unused, 0, expected)


def main():
    passed = [run(case, launch) for case, launch in PROBLEMS]
    # More layers than one kernel takes: the second goes on where the first ended.
    passed.append(run(LayerCase("two_kernels", 17, **SMALL | {"num_layers": 2}), LAUNCH, most_layers=1))
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
