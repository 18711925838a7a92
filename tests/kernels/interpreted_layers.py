"""Runs `decode_layers`'s device code in Triton's interpreter, its programs as threads that wait for each other.

`python tests/kernels/interpreted_layers.py` prints each case with its error; a subprocess of test_decode_layers.py.
"""

import inspect
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import interpreted  # asks for the interpreter, and mends it
import jax
import numpy as np
import triton.language as tl
from kernel_oracle import layers_oracle, relative_error
from triton.runtime import interpreter

from nanovllm_kernels import lowering_for
from nanovllm_kernels.decode_layers import exchange
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


running = threading.Condition()  # held by the program that runs: the interpreter knows of one at a time
builder = interpreter.interpreter_builder


class Together(interpreter.GridExecutor):
    """Launches a kernel whose programs wait for each other: each is a thread, and runs until it has to wait."""

    def __call__(self, *args, **constants):
        taken = {name: value for name, value in constants.items() if name in self.arg_names}
        named = inspect.getcallargs(self.fn, *args, **taken)
        named = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in named.items()
        }
        (programs,) = self.grid
        builder.set_grid_dim(programs, 1, 1)
        scope = interpreter._patch_lang(self.fn)

        def run_program(index):
            with running:
                builder.set_grid_idx(index, 0, 0)
                self.fn(**named)
                running.notify_all()

        with ThreadPoolExecutor(programs) as threads:
            list(threads.map(run_program, range(programs)))
        scope.restore()


def read_words(pointers, mask):
    """Stands for `exchange.read_words`: other programs run until the words are there."""
    program = builder.grid_idx
    running.notify_all()  # of what this program has sent
    while True:
        words = tl.load(pointers, mask=mask, other=1)
        if words.handle.data.all():
            return words
        if not running.wait(timeout=60):
            raise TimeoutError("a program waits for what no other sends")
        builder.set_grid_idx(*program)


interpreter.GridExecutor, exchange.read_words = Together, read_words


def update_in_place(call, *arrays):
    arrays = [np.array(array) for array in arrays]
    call(*arrays)
    return arrays


def run(case, launch, most_layers=device.MOST_LAYERS):
    device.MOST_LAYERS = most_layers
    device.triton_call, device.update_in_place = interpreted.triton_call, update_in_place
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
