"""Every Triton kernel compiles for every supported architecture, on a machine that has no GPU.

Mosaic kernels are lowered for sm_90: layouts, shared memory, barriers and copies are settled there; their PTX is
made where they run.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from nanovllm_kernels import (
    add_rms_norm,
    decode_layers,
    gated_matmul,
    lowering_for,
    paged_decode,
    ragged_prefill,
    rope_cache_write,
    rope_paged_decode,
    sample,
    silu_mul,
    skinny_matmul,
    split_counters,
)
from nanovllm_kernels._compat import import_jax_triton
from nanovllm_kernels.add_rms_norm.cases import CASES as NORM_CASES
from nanovllm_kernels.decode_layers.cases import LayerCase, layer_inputs
from nanovllm_kernels.silu_mul.cases import CASES as SILU_CASES
from nanovllm_kernels.skinny_matmul.cases import CASES as SKINNY_CASES
from nanovllm_kernels.skinny_matmul.cases import PRODUCTS, skinny_inputs
from nanovllm_kernels.skinny_matmul.launch import Launch, Tiling, launch_parameters

ARCHITECTURES = (80, 86, 89, 90, 100)
FP8_ARCHITECTURES = (89, 90, 100)
# Head dims by groups and dtypes, then block sizes; the other dimensions are runtime values in the kernels.
SHAPES = [
    *itertools.product((16, 32, 64, 80, 96, 128, 256), (1, 3, 16), ("bfloat16", "float16", "float32"), (16,)),
    *itertools.product((128,), (2,), ("bfloat16", "float32"), (8, 24, 32, 64, 128, 256)),
]
OPTIONS = ({}, {"sliding_window": 100, "soft_cap": 30.0})
MOSAIC_SHAPES = list(itertools.product((64, 128), (1, 2, 3, 4, 16), ("bfloat16", "float16"), (16, 32, 64, 128)))


@pytest.fixture
def compiled(monkeypatch):
    """(name, shared memory in bytes) of each kernel that triton compiles during a test."""
    triton_lib = import_jax_triton().triton_lib
    compile_kernel = triton_lib.compile_ttir_inplace
    kernels = []

    def recorded(*args):
        result = compile_kernel(*args)
        kernels.append((result.name, result.shared_mem_bytes))
        return result

    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", recorded)
    # Kernels are kept for the life of the process; here each test is to compile its own.
    monkeypatch.setattr(triton_lib.TritonFunction, "_kernel_cache", property(lambda _: {}))
    return kernels


@pytest.fixture
def layouts(compiled, monkeypatch):
    """TritonGPU IR of each such kernel, where layouts are settled."""
    backend = import_jax_triton().triton_lib.cb.CUDABackend
    make_ttgir, kernels = backend.make_ttgir, []

    def recorded(*args):
        module = make_ttgir(*args)
        kernels.append(str(module))
        return module

    monkeypatch.setattr(backend, "make_ttgir", staticmethod(recorded))
    return kernels


def arguments(
    operation,
    *,
    group,
    head_dim,
    block_size,
    dtype,
    cache_dtype=None,
    rows=4,
    tokens=256,
    kv_heads=2,
    table_width=512,
    queries=(),
):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    index = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    caches = (shape((64, kv_heads, block_size, head_dim), dtype=jnp.dtype(cache_dtype or dtype)),) * 2
    if operation is rope_cache_write:
        angles = (shape((tokens, head_dim // 2), dtype=jnp.float32),) * 2
        return (shape((tokens, kv_heads, group + 2, head_dim)), *angles, *caches, index((tokens,)))
    if operation is rope_paged_decode:
        angles = (shape((rows, head_dim // 2), dtype=jnp.float32),) * 2
        qkv = shape((rows, kv_heads, group + 2, head_dim))
        return (qkv, *angles, *caches, index((rows, table_width)), index((rows,)))
    heads = kv_heads * group
    if operation is paged_decode:
        return (shape((rows, *queries, heads, head_dim)), *caches, index((rows, table_width)), index((rows,)))
    lengths = index((rows + 1,)), index((rows,))
    return (shape((tokens, heads, head_dim)), *caches, index((rows, table_width)), *lengths)


def lower(operation, architecture, options=None, donate=(), backend="triton", **shapes):
    """The StableHLO of one call, and the shared memory that one block may use."""
    keywords = (options or {}) if operation is rope_cache_write else {"scale": 0.1, **(options or {})}

    def call(*args):
        return operation(*args, **keywords, backend=backend)

    with lowering_for(architecture) as target:
        traced = jax.jit(call, donate_argnums=donate).trace(*arguments(operation, **shapes))
        return traced.lower(lowering_platforms=("cuda",)).as_text(), target.shared_bytes


QWEN3 = {"group": 2, "head_dim": 128, "block_size": 16, "dtype": "bfloat16"}


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


def lower_sample(architecture, rows, vocab_size, filters):
    def of(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    args = of(jnp.float32, vocab_size), of(jnp.float32), of(jnp.uint32, 2), of(jnp.int32)
    asked = {"top_k": of(jnp.int32), "top_p": of(jnp.float32), "min_p": of(jnp.float32)} if filters else {}

    def call(args, asked):
        return sample(*args, **asked, backend="triton")

    with lowering_for(architecture) as target:
        lowered = jax.jit(call).trace(args, asked).lower(lowering_platforms=("cuda",))
        return lowered.as_text(), target.shared_bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("filters", [False, True], ids=["plain", "filtered"])
def test_sampling_kernels_compile_and_fit_in_shared_memory(compiled, architecture, filters):
    text, limit = lower_sample(architecture, 256, 151_936, filters)
    names = ["scan_kernel", "select_kernel"] if filters else ["plain_kernel", "merge_kernel"]
    assert text.count("custom_call @triton_kernel_call_ffi") == 2
    assert [name for name, _ in compiled] == names
    assert all(shared <= limit for _, shared in compiled)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 1), (1, 151_936), (32, 49_152), (3, 128_256), (256, 32_001)])
@pytest.mark.parametrize("filters", [False, True], ids=["plain", "filtered"])
def test_sampling_kernels_compile_for_every_size(compiled, architecture, rows, vocab_size, filters):
    _, limit = lower_sample(architecture, rows, vocab_size, filters)
    assert all(shared <= limit for _, shared in compiled)


@pytest.mark.parametrize("operation", [rope_cache_write, paged_decode, rope_paged_decode, ragged_prefill])
def test_dimensions_of_1_compile_too(operation):
    # Triton turns scalar arguments that are 1 into constants, which changes their type inside a kernel.
    text, _ = lower(operation, 90, **QWEN3, rows=1, tokens=1, kv_heads=1, table_width=1)
    assert "custom_call @triton_kernel_call_ffi" in text


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


def test_rope_cache_write_lowers_to_an_in_place_update():
    text, _ = lower(rope_cache_write, 90, donate=(3, 4), **QWEN3)
    assert text.count("output_operand_alias<") == 2
    assert text.count("tf.aliasing_output") == 2


def test_rope_paged_decode_is_one_kernel_where_rows_fill_the_chip_and_updates_caches_in_place(compiled):
    def call(*args):
        counters = jax.new_ref(split_counters())
        return rope_paged_decode(*args, scale=0.1, counters=counters, backend="triton")

    with lowering_for(90):
        shapes = arguments(rope_paged_decode, **QWEN3, kv_heads=8, rows=32)
        traced = jax.jit(call, donate_argnums=(3, 4)).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert [name for name, _ in compiled] == ["rope_decode_kernel"]
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


def lower_skinny(case, architecture, *, in_kernel_merge):
    arrays = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in skinny_inputs(case).items()}

    def call(arrays):
        counters = jax.new_ref(split_counters()) if in_kernel_merge else None
        return skinny_matmul(**arrays, **case.options, counters=counters, backend="triton")

    with lowering_for(architecture) as target:
        text = jax.jit(call).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
        return text, target.shared_bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["one_row_gated", "qkv_bias", "down", "fp8_channel"])
def test_skinny_matmul_compiles_and_splits_are_merged_inside_with_counters(compiled, architecture, name):
    case = next(case for case in SKINNY_CASES if case.name == name)
    old = name == "fp8_channel" and architecture < 89
    text, limit = lower_skinny(case, architecture, in_kernel_merge=True)
    assert [kernel for kernel, _ in compiled] == ([] if old else ["product_kernel"])
    assert text.count("custom_call @triton_kernel_call_ffi") == (not old)
    assert all(shared <= limit for _, shared in compiled)


@pytest.mark.parametrize("rows", [16, 32, 128, 192, 256])
@pytest.mark.parametrize("case", PRODUCTS["qwen3_0_6b"], ids=lambda case: case.name)
def test_skinny_matmul_lowers_to_the_kernel_that_the_table_names(compiled, case, rows):
    case = dataclasses.replace(case, rows=rows)
    sizes = {"rows": rows, "inputs": case.inputs, "outputs": case.outputs, "gated": case.gated, "w_bytes": 2}
    with lowering_for(90) as target:
        chosen = launch_parameters(target, **sizes, mosaic=True)
    text, _ = lower_skinny(case, 90, in_kernel_merge=True)
    assert text.count("custom_call @mosaic_gpu_v2") == isinstance(chosen, Tiling)
    assert len(compiled) == isinstance(chosen, Launch)
    # Other GPUs have no such kernel.
    text, _ = lower_skinny(case, 80, in_kernel_merge=True)
    assert "mosaic_gpu" not in text


def test_skinny_matmul_merges_splits_in_a_second_kernel_without_counters(compiled):
    case = next(case for case in SKINNY_CASES if case.name == "down")
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


def lower_layers(case, architecture, donate=()):
    def call(*args):
        return decode_layers(*args, **case.options, backend="triton")

    with lowering_for(architecture) as target:
        arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), layer_inputs(case))
        traced = jax.jit(call, donate_argnums=donate).trace(*arrays)
        return traced.lower(lowering_platforms=("cuda",)).as_text(), target.shared_bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "case",
    [
        LayerCase("with_norms", 100, 256, 4, 2, 128, 512),
        LayerCase("with_bias", 100, 448, 7, 1, 64, 1024, qk_norm=False, qkv_bias=True, sliding_window=50),
    ],
    ids=lambda case: case.name,
)
def test_layers_compile_to_one_kernel_that_updates_the_caches_in_place(compiled, architecture, case):
    text, limit = lower_layers(case, architecture, donate=(4,))
    assert text.count("custom_call @triton_kernel_call_ffi") == 1
    assert [name for name, _ in compiled] == ["decode_layers_kernel"]
    assert all(shared <= limit for _, shared in compiled)
    assert text.count("tf.aliasing_output") == 2 * case.num_layers


LAYOUT = re.compile(
    r"^(#\w+) = #ttg\.blocked<\{sizePerThread = (.*?), threadsPerWarp = (.*?), warpsPerCTA = (.*?), order", re.MULTILINE
)
VOLATILE = re.compile(r"tt\.load .*isVolatile = true.*tensor<([\dx]+)x!tt\.ptr<i(?:32|64)>, (#\w+)>")


@pytest.mark.parametrize("head_dim", [16, 128])
def test_no_two_threads_read_the_same_word_that_a_program_waits_for(layouts, head_dim):
    # Each would read it at a time of its own, and the check whether it has come asks only one of them.
    lower_layers(LayerCase("small", 100, 256, 4, 2, head_dim, 512), 90)
    (ir,) = layouts
    parts = {name: [json.loads(part) for part in parts] for name, *parts in LAYOUT.findall(ir)}
    loads = VOLATILE.findall(ir)
    assert len(loads) == ir.count("isVolatile = true") > 10
    for shape, layout in loads:
        sizes = [math.prod(along) for along in zip(*parts[layout], strict=True)]
        assert all(size <= int(length) for size, length in zip(sizes, shape.split("x"), strict=True)), (shape, sizes)


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


def test_unknown_architecture_is_refused_with_those_known():
    with (
        pytest.raises(ValueError, match=r"compute_capability is 75; known ones are \[80, 86, 89, 90"),
        lowering_for(75),
    ):
        pass


def test_package_works_without_triton():
    program = """
import sys
sys.modules["triton"] = sys.modules["jax_triton"] = None
import jax.numpy as jnp
from nanovllm_kernels import rope_cache_write
qkv, cache, slots = jnp.ones((1, 1, 3, 8)), jnp.zeros((2, 1, 4, 8)), jnp.zeros(1, jnp.int32)
args = qkv, jnp.ones((1, 4)), jnp.zeros((1, 4)), cache, cache, slots
assert rope_cache_write(*args, backend="xla")[1].sum() == 8
try:
    rope_cache_write(*args, backend="triton")
except ImportError as error:
    assert "use backend='xla'" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


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


@pytest.mark.slow
@pytest.mark.parametrize("shape", MOSAIC_SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_every_supported_shape_lowers_to_a_mosaic_kernel(shape):
    shapes = dict(zip(("head_dim", "group", "dtype", "block_size"), shape, strict=True))
    text, _ = lower(ragged_prefill, 90, backend="mosaic", **shapes)
    assert text.count("custom_call @mosaic_gpu_v2") == 1
