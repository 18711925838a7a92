"""Attention and cache kernels compile for every supported architecture, on a machine that has no GPU.

Mosaic kernels are lowered for sm_90: layouts, shared memory, barriers and copies are settled there; their PTX is
made where they run.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from lowering import ARCHITECTURES, FP8_ARCHITECTURES, QWEN3, arguments, lower

from nanovllm_kernels import (
    lowering_for,
    paged_decode,
    ragged_prefill,
    rope_cache_write,
    rope_paged_decode,
    split_counters,
)

# Head dims by groups and dtypes, then block sizes; the other dimensions are runtime values in the kernels.
SHAPES = [
    *itertools.product((16, 32, 64, 80, 96, 128, 256), (1, 3, 16), ("bfloat16", "float16", "float32"), (16,)),
    *itertools.product((128,), (2,), ("bfloat16", "float32"), (8, 24, 32, 64, 128, 256)),
]
OPTIONS = ({}, {"sliding_window": 100, "soft_cap": 30.0})
MOSAIC_SHAPES = list(itertools.product((64, 128), (1, 2, 3, 4, 16), ("bfloat16", "float16"), (16, 32, 64, 128)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("operation", "kernels", "shapes"),
    [
        (rope_cache_write, ["rope_cache_write_kernel"], {}),
        (paged_decode, ["decode_kernel", "merge_kernel"], {"rows": 1}),
        (paged_decode, ["decode_kernel", "merge_kernel"], {"queries": (4,)}),
        (rope_paged_decode, ["rope_decode_kernel", "merge_kernel"], {}),
        (ragged_prefill, ["prefill_kernel"], {"tokens": 4096}),
    ],
    ids=["rope_cache_write", "paged_decode", "paged_decode_4_queries", "rope_paged_decode", "ragged_prefill"],
)
def test_kernels_compile_and_fit_in_shared_memory(compiled, architecture, operation, kernels, shapes):
    text, limit = lower(operation, architecture, **QWEN3, **shapes)
    assert text.count("custom_call @triton_kernel_call_ffi") == len(kernels)
    assert [name for name, _ in compiled] == kernels
    assert all(shared <= limit for _, shared in compiled)


@pytest.mark.parametrize("architecture", FP8_ARCHITECTURES)
@pytest.mark.parametrize("operation", [rope_cache_write, paged_decode, rope_paged_decode, ragged_prefill])
def test_kernels_of_float8_caches_compile(compiled, architecture, operation):
    scales = {"k_scale": jnp.ones(2), "v_scale": jnp.ones(2)}
    _, limit = lower(operation, architecture, scales, **QWEN3, cache_dtype="float8_e4m3fn")
    assert compiled
    assert all(shared <= limit for _, shared in compiled)


@pytest.mark.parametrize("operation", [rope_cache_write, paged_decode, rope_paged_decode, ragged_prefill])
def test_dimensions_of_1_compile_too(operation):
    # Triton turns scalar arguments that are 1 into constants, which changes their type inside a kernel.
    text, _ = lower(operation, 90, **QWEN3, rows=1, tokens=1, kv_heads=1, table_width=1)
    assert "custom_call @triton_kernel_call_ffi" in text


def test_rope_cache_write_lowers_to_an_in_place_update():
    text, _ = lower(rope_cache_write, 90, donate=(3, 4), **QWEN3)
    assert text.count("output_operand_alias<") == 2
    assert text.count("tf.aliasing_output") == 2


def test_rope_paged_decode_is_one_kernel_where_rows_fill_the_chip_and_updates_caches_in_place(compiled):
    def call(*args):
        counters = jax.new_ref(split_counters())
        return rope_paged_decode(*args, scale=0.1, counters=counters, backend="triton")

    with lowering_for(89):
        shapes = arguments(rope_paged_decode, **QWEN3, kv_heads=8, rows=32)
        traced = jax.jit(call, donate_argnums=(3, 4)).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert [name for name, _ in compiled] == ["rope_decode_kernel"]
    assert text.count("tf.aliasing_output") == 2


@pytest.mark.parametrize(
    ("changes", "in_mosaic"),
    [
        ({}, True),
        ({"rows": 40, "group": 3, "block_size": 8, "norm": False}, True),
        ({"rows": 80, "group": 6}, True),
        ({"rows": 32, "group": 2}, True),
        ({"rows": 128, "group": 2}, True),
        ({"kv_heads": 4}, True),
        ({"kv_heads": 2, "rows": 32}, True),
        ({"kv_heads": 2, "rows": 256}, True),
        ({"rows": 30}, False),
        ({"rows": 256, "group": 2}, False),
        ({"group": 1}, False),
        ({"kv_heads": 2, "rows": 30}, False),
        ({"kv_heads": 1, "rows": 128}, False),
        ({"dtype": "float16"}, False),
        ({"block_size": 32}, False),
        ({"sliding_window": 100}, False),
        ({"architecture": 89}, False),
    ],
    ids=str,
)
def test_rope_paged_decode_is_one_mosaic_kernel_where_that_is_the_faster_one(changes, in_mosaic):
    sizes = {"group": 4, "head_dim": 128, "block_size": 16, "dtype": "bfloat16", "kv_heads": 8, "rows": 64} | changes
    architecture, window = sizes.pop("architecture", 90), sizes.pop("sliding_window", None)
    weight = jnp.ones(128, sizes["dtype"]) if sizes.pop("norm", True) else None

    def call(*args):
        counters = jax.new_ref(split_counters())
        options = {"q_norm": weight, "k_norm": weight, "sliding_window": window, "counters": counters}
        return rope_paged_decode(*args, scale=0.1, **options, backend="triton")

    with lowering_for(architecture):
        shapes = arguments(rope_paged_decode, **sizes)
        traced = jax.jit(call, donate_argnums=(3, 4)).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == in_mosaic
    assert ("triton_kernel_call" in text) != in_mosaic
    assert text.count("tf.aliasing_output") == 2


@pytest.mark.parametrize("fill", [0.5, 2.5, 5, 10])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        (90, {}),
        (86, {}),
        (86, {"dtype": "float32", "head_dim": 256, "group": 16}),
        (89, {"dtype": "float32", "head_dim": 64, "cache_dtype": "bfloat16"}),
        (80, {"dtype": "float32", "head_dim": 256, "cache_dtype": "bfloat16"}),
    ],
)
def test_decode_fits_in_shared_memory_with_few_and_with_many_rows(compiled, architecture, changes, fill):
    with lowering_for(architecture) as target:
        rows = round(fill * target.multiprocessors / 2)
    shapes = QWEN3 | changes | {"rows": rows, "table_width": 64}
    for operation in (paged_decode, rope_paged_decode):
        _, limit = lower(operation, architecture, **shapes)
    assert all(shared <= limit for _, shared in compiled)


def test_rope_paged_decode_of_many_float8_rows_is_both_operations(compiled):
    lower(rope_paged_decode, 90, **QWEN3, kv_heads=8, rows=256, cache_dtype="float8_e4m3fn")
    assert [name for name, _ in compiled] == ["rope_cache_write_kernel", "decode_kernel", "merge_kernel"]


# What turns two neighbouring pairs of float8 keys into numbers at once, without moving bytes first.
TWO_PAIRS = re.compile(
    r"elementwise_inline_asm \"(?:(?!prmt)[^\"])*cvt\.rn\.f16x2\.e4m3x2.*?tensor<[\dx]+xi16, (#\w+)>"
)
NEIGHBOURS = r"#ttg\.(?:linear<\{register = \[\[0, 1\]|blocked<\{sizePerThread = \[1, (?:[2468]|16)\])"


@pytest.mark.parametrize("architecture", [89, 90])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_thread_has_the_pairs_of_float8_keys_that_lie_beside_each_other(layouts, architecture, dtype):
    # Triton hands inline assembly two elements of a thread; only a layout says which.
    lower(paged_decode, architecture, **QWEN3 | {"dtype": dtype}, cache_dtype="float8_e4m3fn")
    (ir,) = [ir for ir in layouts if "e4m3x2" in ir]
    names = TWO_PAIRS.findall(ir)
    assert names
    assert all(re.search(rf"^{name} = {NEIGHBOURS}", ir, re.MULTILINE) for name in names)


def test_mosaic_kernel_lowers_for_sm_90_and_is_lowered_once_for_all_layers():
    with lowering_for(90):

        def layers(q, *args):
            for _ in range(3):
                q = ragged_prefill(q, *args, scale=0.1, backend="mosaic")
            return q

        arrays = arguments(ragged_prefill, **QWEN3, tokens=4096)
        text = jax.jit(layers).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 1
    assert "triton_kernel_call" not in text


@pytest.mark.parametrize("shapes", [{"rows": 1, "tokens": 1, "kv_heads": 1, "table_width": 1}, {"tokens": 101}])
def test_mosaic_kernel_lowers_at_odd_sizes(shapes):
    text, _ = lower(ragged_prefill, 90, backend="mosaic", **QWEN3, **shapes)
    assert "custom_call @mosaic_gpu_v2" in text


@pytest.mark.parametrize(
    ("architecture", "changes", "options"),
    [
        (80, {}, None),
        (90, {"head_dim": 80}, None),
        (90, {"dtype": "float32"}, None),
        (90, {"block_size": 8}, None),
        (90, {}, {"sliding_window": 100}),
        (90, {}, {"soft_cap": 30.0}),
    ],
)
def test_what_mosaic_does_not_support_falls_back_to_triton(architecture, changes, options):
    text, _ = lower(ragged_prefill, architecture, options, backend="mosaic", **QWEN3 | changes)
    assert "custom_call @triton_kernel_call_ffi" in text
    assert "mosaic_gpu" not in text


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda index: "-".join(map(str, SHAPES[index])))
def test_every_shape_compiles_and_fits_in_shared_memory(compiled, architecture, index):
    shapes = dict(zip(("head_dim", "group", "dtype", "block_size"), SHAPES[index], strict=True))
    options = OPTIONS[(index + architecture) % 2]
    _, limit = lower(rope_cache_write, architecture, **shapes)
    lower(paged_decode, architecture, options, **shapes)
    lower(rope_paged_decode, architecture, options, **shapes)
    lower(ragged_prefill, architecture, options, **shapes)
    too_big = [(name, shared) for name, shared in compiled if shared > limit]
    assert not too_big


@pytest.mark.slow
@pytest.mark.parametrize("shape", MOSAIC_SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_every_supported_shape_lowers_to_a_mosaic_kernel(shape):
    shapes = dict(zip(("head_dim", "group", "dtype", "block_size"), shape, strict=True))
    text, _ = lower(ragged_prefill, 90, backend="mosaic", **shapes)
    assert text.count("custom_call @mosaic_gpu_v2") == 1
