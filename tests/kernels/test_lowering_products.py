"""Products, norms and activations compile for every supported architecture, on a machine that has no GPU."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from lowering import ARCHITECTURES

from nanovllm_kernels import add_rms_norm, gated_matmul, lowering_for, silu_mul, split_counters
from nanovllm_kernels.add_rms_norm.cases import CASES as NORM_CASES
from nanovllm_kernels.silu_mul.cases import CASES as SILU_CASES
from nanovllm_kernels.skinny_matmul.cases import CASES as SKINNY_CASES
from nanovllm_kernels.skinny_matmul.cases import PRODUCTS, SkinnyCase, as_in_a_layer, product_of, skinny_inputs
from nanovllm_kernels.skinny_matmul.launch import Launch, Target, Tiling, launch_parameters


def lower_skinny(case, architecture, *, in_kernel_merge):
    arrays = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in skinny_inputs(case).items()}

    def call(arrays):
        counters = jax.new_ref(split_counters()) if in_kernel_merge else None
        return product_of(arrays, **case.options, counters=counters, backend="triton")

    with lowering_for(architecture) as target:
        text = jax.jit(call).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
        return text, target.shared_bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["one_row_gated", "qkv_bias", "o", "fp8_channel"])
def test_skinny_matmul_compiles_and_splits_are_merged_inside_with_counters(compiled, architecture, name):
    case = next(case for case in SKINNY_CASES if case.name == name)
    old = name == "fp8_channel" and architecture < 89
    text, limit = lower_skinny(case, architecture, in_kernel_merge=True)
    assert [kernel for kernel, _ in compiled] == ([] if old else ["product_kernel"])
    assert text.count("custom_call @triton_kernel_call_ffi") == (not old)
    assert all(shared <= limit for _, shared in compiled)


@pytest.mark.parametrize("in_a_layer", [False, True])
@pytest.mark.parametrize("rows", [16, 32, 128, 192, 256])
@pytest.mark.parametrize("case", PRODUCTS["qwen3_0_6b"], ids=lambda case: case.name)
def test_skinny_matmul_lowers_to_the_kernel_that_the_table_names(compiled, case, rows, in_a_layer):
    case = dataclasses.replace(as_in_a_layer(case) if in_a_layer else case, rows=rows)
    sizes = {"rows": rows, "inputs": case.inputs, "outputs": case.outputs, "gated": case.gated, "w_bytes": 2}
    with lowering_for(90) as target:
        chosen = launch_parameters(target, **sizes, normed=case.norm or case.scaled, takes=lambda _: True)
    text, _ = lower_skinny(case, 90, in_kernel_merge=True)
    assert text.count("custom_call @mosaic_gpu_v2") == isinstance(chosen, Tiling)
    assert len(compiled) == isinstance(chosen, Launch)
    # Other GPUs have no such kernel.
    text, _ = lower_skinny(case, 80, in_kernel_merge=True)
    assert "mosaic_gpu" not in text


@pytest.mark.parametrize(
    ("rows", "outputs", "scaled"), [(16, 12288, False), (64, 12288, False), (128, 12288, False), (128, 6144, True)]
)
def test_tuned_tiles_in_two_pieces_lower(rows, outputs, scaled):
    """Mosaic refuses columns that it cannot tell to begin with a row of their swizzle."""
    case = SkinnyCase("gate_up", rows, 4096, outputs, norm=not scaled, scaled=scaled, gated=True)
    sizes = {"rows": rows, "inputs": 4096, "outputs": outputs, "gated": True, "w_bytes": 2}
    target = Target(90, 132, 227 * 1024, "NVIDIA H200")
    assert launch_parameters(target, **sizes, normed=True, takes=lambda _: True).pieces == 2
    text, _ = lower_skinny(case, target, in_kernel_merge=True)
    assert text.count("custom_call @mosaic_gpu_v2") == 1


@pytest.mark.parametrize(("rows", "outputs", "scaled"), [(64, 12192, False), (128, 6096, True)])
def test_an_odd_number_of_tiles_in_two_pieces_lowers_too(rows, outputs, scaled):
    """N is no multiple of a row of the wide piece's swizzle."""
    case = SkinnyCase("gate_up", rows, 4096, outputs, norm=not scaled, scaled=scaled, gated=True)
    text, _ = lower_skinny(case, Target(90, 132, 227 * 1024, "NVIDIA H200"), in_kernel_merge=True)
    assert text.count("custom_call @mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    "case",
    [
        SkinnyCase("norm", 64, 4096, 4096, norm=True),
        SkinnyCase("norm_wide", 64, 12288, 4096, norm=True),
        SkinnyCase("norm_bias", 64, 3584, 3584, norm=True, bias=True),
        SkinnyCase("next_norm", 64, 4096, 4096, residual=True, next_norm=True),
        SkinnyCase("next_norm_wide", 64, 12288, 4096, residual=True, next_norm=True),
        SkinnyCase("gate_up", 32, 2048, 3072, norm=True, gated=True),
        SkinnyCase("gate_up_wide", 64, 6144, 3072, norm=True, gated=True),
        SkinnyCase("scaled_both", 128, 1024, 4096, scaled=True, residual=True, next_norm=True),
    ],
    ids=lambda case: case.name,
)
def test_products_that_a_tuned_tile_has_no_room_for_take_another(case):
    for kind in ("NVIDIA H200", "NVIDIA H100"):
        lower_skinny(case, Target(90, 132, 227 * 1024, kind), in_kernel_merge=True)


def test_skinny_matmul_merges_splits_in_a_second_kernel_without_counters(compiled):
    case = next(case for case in SKINNY_CASES if case.name == "o")
    lower_skinny(case, 90, in_kernel_merge=False)
    assert [kernel for kernel, _ in compiled] == ["product_kernel", "merge_splits_kernel"]


@pytest.mark.parametrize(
    ("architecture", "rows", "inputs", "dtype", "fused"),
    [
        (90, 16384, 1024, "bfloat16", True),
        (90, 2048, 1024, "float16", True),
        # Few rows leave programs without a tile; of long ones cuBLAS's product is the faster one.
        (90, 1024, 1024, "bfloat16", False),
        (90, 2048, 2048, "bfloat16", False),
        (90, 2048, 1024, "float32", False),
        (100, 2048, 1024, "bfloat16", False),
    ],
)
def test_gated_matmul_lowers_to_one_kernel_for_many_short_rows(architecture, rows, inputs, dtype, fused):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, inputs), (inputs, 2, 3072))]
    with lowering_for(architecture):
        traced = jax.jit(lambda x, w: gated_matmul(x, w, backend="triton")).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == fused
    assert text.count("custom_call @triton_kernel_call_ffi") == (not fused)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("added", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("case", NORM_CASES, ids=lambda case: case.name)
def test_add_rms_norm_compiles_to_one_kernel(compiled, architecture, case, added):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(case.dtype))
    x, weight = shape((case.num_tokens, case.size)), shape((case.size,))
    with lowering_for(architecture):
        traced = jax.jit(lambda *args: add_rms_norm(*args, eps=1e-6, backend="triton")).trace(
            x, x if added else None, weight
        )
        traced.lower(lowering_platforms=("cuda",))
    assert [name for name, _ in compiled] == ["add_rms_norm_kernel" if added else "rms_norm_kernel"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", SILU_CASES, ids=lambda case: case.name)
def test_silu_mul_compiles_to_one_kernel(compiled, architecture, case):
    gate_up = jax.ShapeDtypeStruct((case.num_tokens, 2, case.size), jnp.dtype(case.dtype))
    with lowering_for(architecture):
        traced = jax.jit(lambda gate_up: silu_mul(gate_up, backend="triton")).trace(gate_up)
        traced.lower(lowering_platforms=("cuda",))
    assert [name for name, _ in compiled] == ["silu_mul_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_skinny_matmul_compiles_and_fits_in_shared_memory(compiled, architecture):
    products = [
        dataclasses.replace(case, rows=rows)
        for case in itertools.chain(*PRODUCTS.values())
        for rows in (1, 8, 32, 64, 128, 256)
        if case.inputs * case.outputs <= 2**22
    ]
    for case, in_kernel_merge in itertools.product((*SKINNY_CASES, *products), (False, True)):
        _, limit = lower_skinny(case, architecture, in_kernel_merge=in_kernel_merge)
    too_big = [(name, shared) for name, shared in compiled if shared > limit]
    assert not too_big
