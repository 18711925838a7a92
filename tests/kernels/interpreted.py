"""Runs `skinny_matmul`'s device code in Triton's interpreter, which must be asked for before triton is imported.

`python tests/kernels/interpreted.py`: prints each case with its error; a subprocess of test_skinny_matmul.py.
"""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import jax
import ml_dtypes
import numpy as np
from kernel_oracle import passed_on_oracle, relative_error, skinny_oracle

from nanovllm_kernels import lowering_for
from nanovllm_kernels._compat import import_jax_triton
from nanovllm_kernels.skinny_matmul.cases import SkinnyCase, skinny_inputs
from nanovllm_kernels.skinny_matmul.launch import Launch

import_jax_triton()
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

from nanovllm_kernels.skinny_matmul import triton as skinny  # noqa: E402

# Triton 3.6's interpreter multiplies the bits of bfloat16 matrices instead of their values, casts to bfloat16 without
# rounding, and e4m3 wrongly.
BITS = {"bf16": ml_dtypes.bfloat16, "fp8e4nv": ml_dtypes.float8_e4m3fn}
multiply, convert = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_to_fp


def exact(handle):
    """The values of a handle of bfloat16 or e4m3 as float32; others as they are."""
    dtype = BITS.get(handle.dtype.scalar.name)
    return handle if dtype is None else TensorHandle(handle.data.view(dtype).astype(np.float32), tl.float32)


def create_dot(self, a, b, *rest):
    return multiply(self, exact(a), exact(b), *rest)


def create_fp_to_fp(self, source, to, rounding):
    wide = exact(source)
    if to.scalar == wide.dtype.scalar:
        return wide
    if to.scalar == tl.bfloat16:
        return TensorHandle(wide.data.astype(ml_dtypes.bfloat16).view(np.uint16), to.scalar)
    return convert(self, wide, to, rounding)


InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_to_fp = create_dot, create_fp_to_fp
InterpreterBuilder.create_fp_trunc = lambda self, source, to: create_fp_to_fp(self, source, to, None)
TRITON_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "float8_e4m3fn": "fp8e4nv"}


class Pointer:
    """What the interpreter asks of a tensor, over a NumPy array that it changes in place."""

    def __init__(self, array):
        self.array, self.dtype = array, TRITON_DTYPES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return SimpleNamespace(data_ptr=self.data_ptr, cpu=lambda: None, copy_=lambda other: None)

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        return self

    def storage_offset(self):
        return 0

    size = stride = storage_offset


def triton_call(*args, kernel, out_type, grid, num_warps, num_stages, **constants):
    """Stands for `_compat.triton_call`; what a kernel does not write stays NaN."""
    leaves, tree = jax.tree.flatten(out_type)
    outputs = [np.full(leaf.shape, np.nan, leaf.dtype) for leaf in leaves]
    args = [np.asarray(arg) if isinstance(arg, jax.Array) else arg for arg in args]
    args = jax.tree.map(lambda arg: Pointer(arg) if isinstance(arg, np.ndarray) else arg, (*args, *outputs))
    kernel[grid](*args, **constants)
    return jax.tree.unflatten(tree, outputs)


def run(case, launch, *, in_kernel_merge):
    skinny.triton_call = triton_call
    arrays = {name: np.array(array, order="C") for name, array in skinny_inputs(case).items()}
    counters = np.zeros(64, np.int32) if in_kernel_merge else None
    unused = dict.fromkeys(("norm", "w_scale", "bias", "residual", "squares", "next_norm"))
    options = unused | arrays | case.options
    with lowering_for(90):
        got, *passed_on = skinny.skinny_matmul_triton(
            **options | {"out_dtype": np.dtype(case.out_dtype or arrays["x"].dtype)}, counters=counters, launch=launch
        )
    error = relative_error(got, skinny_oracle(arrays, case))
    if case.next_norm:
        scaled, squares = passed_on_oracle(got, arrays["next_norm"])
        error = max(error, relative_error(passed_on[0], scaled))
        error = max(error, relative_error(passed_on[1].sum(axis=0)[: case.rows], squares))
    clean = counters is None or not counters.any()
    print(f"{case.name:12} {launch} {in_kernel_merge=} {error:.1e} {clean=}", flush=True)
    return error < (5e-3 if case.dtype == "bfloat16" else 2e-3) and clean


EVERYTHING = {"norm": True, "bias": True, "residual": True}
ONE_ROW, TILE = Launch(1, 32, 64, 1, 4, 2), Launch(16, 32, 64, 1, 4, 2)
PROBLEMS = [
    (SkinnyCase("even", 17, 128, 64, residual=True), TILE),
    (SkinnyCase("odd", 5, 300, 77, **EVERYTHING), TILE),
    (SkinnyCase("gated", 20, 300, 40, gated=True, **EVERYTHING), TILE),
    (SkinnyCase("one_row", 1, 300, 77, **EVERYTHING), ONE_ROW),
    (SkinnyCase("one_gated", 1, 300, 77, gated=True, **EVERYTHING), ONE_ROW),
    (SkinnyCase("head", 3, 160, 70, w_layout="nk", out_dtype="float32"), TILE),
    (SkinnyCase("fp8", 3, 128, 64, gated=True, scale="channel"), TILE),
    (SkinnyCase("fp8_tensor", 1, 128, 64, scale="tensor"), ONE_ROW),
    (SkinnyCase("passed_on", 20, 300, 77, scaled=True, next_norm=True, bias=True, residual=True), TILE),
    (SkinnyCase("gated_on", 20, 300, 77, scaled=True, gated=True), TILE),
    (SkinnyCase("one_passed", 1, 300, 77, scaled=True, next_norm=True), ONE_ROW),
    (SkinnyCase("float16", 3, 128, 64, norm=True, dtype="float16"), TILE),
]


def main():
    passed = []
    for case, launch in PROBLEMS:
        passed.append(run(case, launch, in_kernel_merge=False))
        for in_kernel_merge in (False, True):
            # Three splits of 300 or fewer inputs: the last may be short or empty.
            passed.append(run(case, replace(launch, splits=3), in_kernel_merge=in_kernel_merge))
        if launch.tile_rows > 1:
            passed.append(run(case, replace(launch, swap=True), in_kernel_merge=False))
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
