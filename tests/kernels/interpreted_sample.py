"""Runs the Triton kernels of `sample` in Triton's interpreter, on arrays of this machine.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_sample.py STRIDE VOCAB_SIZE...

Every STRIDE-th of the hard rows; exits with an error if a token is wrong. The environment variable must be set before
triton is imported, hence a process of its own.
"""

import importlib
import sys

import jax
import numpy as np
import triton
import triton.language as tl
from sample_oracle import assert_draws
from triton.runtime import interpreter

from nanovllm_kernels import lowering_for
from nanovllm_kernels.sample import device_filtered, device_search
from nanovllm_kernels.sample.cases import hard_inputs

launch = importlib.import_module("nanovllm_kernels.sample.triton")
device = importlib.import_module("nanovllm_kernels.sample.device")


class HostArray:
    """A NumPy array with as much of a torch tensor's interface as the interpreter asks for."""

    def __init__(self, array):
        self.array = array
        self.dtype = array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.array is self.array

    def new_empty(self, *_, **__):
        return HostArray(self.array)

    def set_(self, storage, *_):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


@triton.jit
def exact_log2(x):
    return tl.log2(x)


def interpret(*args, kernel, out_type, grid, num_warps, num_stages, **constants):
    """`triton_call`, with outputs poisoned."""
    leaves, tree = jax.tree.flatten(out_type)
    outputs = [np.full(leaf.shape, np.nan if leaf.dtype.kind == "f" else -7, leaf.dtype) for leaf in leaves]
    inputs = [arg if isinstance(arg, int) else HostArray(np.ascontiguousarray(arg)) for arg in args]
    kernel[grid](*inputs, *map(HostArray, outputs), **constants)
    return jax.tree.unflatten(tree, outputs)


def patch_interpreter():
    """What the interpreter lacks.

    It knows no instructions of the GPU; and scalars are arrays of one element to it, which NumPy 2.5 turns into no int.
    """
    device.approximate_log2 = exact_log2
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def drawn_of_shards(logits, *options):
    """Tokens of a vocabulary in two parts, each raced alone."""
    middle = logits.shape[1] // 3 + 1
    parts = [
        launch.race_triton(part, *options, np.array([first], np.int32))
        for part, first in ((logits[:, :middle], 0), (logits[:, middle:], middle))
        if part.shape[1]
    ]
    scores, ids = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    best = scores.max(axis=1)
    tokens = np.where(scores == best[:, None], ids, np.iinfo(np.int32).max).min(axis=1)
    return np.where(np.isfinite(best), tokens, -1)


def main(stride, *vocab_sizes):
    patch_interpreter()
    launch.triton_call = interpret
    passes = 0
    narrow = device_search.narrow

    def counted(*args):
        nonlocal passes
        passes += 1
        return narrow(*args)

    device_search.narrow = counted
    # Fewer groups than on a GPU, so that a small vocabulary takes every path.
    small = {"HELD_GROUPS": tl.constexpr(2), "READ_GROUPS": tl.constexpr(2), "TALLY_GROUPS": tl.constexpr(1)}
    for module in (launch, device_filtered, device_search):
        vars(module).update({name: value for name, value in small.items() if name in vars(module)})
    with lowering_for(90), np.errstate(all="ignore"):
        for vocab_size in vocab_sizes:
            args, filters = hard_inputs(vocab_size, seed=vocab_size)
            args = [arg[::stride] for arg in args]
            filters = {name: value[::stride] for name, value in filters.items()}
            assert_draws(launch.sample_triton(*args, None), *args)
            assert_draws(launch.sample_triton(*args, tuple(filters.values())), *args, **filters)
            assert_draws(drawn_of_shards(*args), *args)
    assert passes > 0  # or no row took the path of many candidates


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
