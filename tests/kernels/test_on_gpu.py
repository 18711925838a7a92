"""The Triton and Mosaic kernels on a real GPU: `pytest -m gpu tests/kernels`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from kernel_oracle import (
    add_rms_norm_oracle,
    decode_oracle,
    dequantised,
    gated_oracle,
    layers_oracle,
    prefill_oracle,
    relative_error,
    silu_mul_oracle,
    skinny_oracle,
    write_oracle,
)
from sample_oracle import assert_draws, kept
from scipy import stats

from nanovllm_kernels import (
    add_rms_norm,
    add_shards,
    decode_layers,
    gated_matmul,
    paged_decode,
    ragged_prefill,
    rope_cache_write,
    rope_paged_decode,
    sample,
    silu_mul,
    skinny_matmul,
    split_counters,
)
from nanovllm_kernels._cases import AttentionCase, attention_inputs
from nanovllm_kernels.add_rms_norm.cases import CASES as NORM_CASES
from nanovllm_kernels.add_rms_norm.cases import add_rms_norm_inputs
from nanovllm_kernels.add_shards.cases import CASES as SUM_CASES
from nanovllm_kernels.add_shards.exchange import make_exchange, programs_that_failed
from nanovllm_kernels.decode_layers.cases import CASES as LAYER_CASES
from nanovllm_kernels.decode_layers.cases import layer_inputs
from nanovllm_kernels.gated_matmul.cases import CASES as GATED_CASES
from nanovllm_kernels.gated_matmul.cases import gated_inputs
from nanovllm_kernels.paged_decode.cases import CASES as DECODE_CASES
from nanovllm_kernels.ragged_prefill import mosaic_supports
from nanovllm_kernels.ragged_prefill.cases import CASES as PREFILL_CASES
from nanovllm_kernels.rope_cache_write.cases import CASES as WRITE_CASES
from nanovllm_kernels.rope_cache_write.cases import rope_cache_write_inputs
from nanovllm_kernels.rope_paged_decode.cases import CASES as ROPE_DECODE_CASES
from nanovllm_kernels.rope_paged_decode.cases import rope_paged_decode_inputs
from nanovllm_kernels.rope_paged_decode.reference import newest_slots
from nanovllm_kernels.sample.cases import BENCHMARKS as SAMPLE_CASES
from nanovllm_kernels.sample.cases import hard_inputs, sample_inputs
from nanovllm_kernels.silu_mul.cases import CASES as SILU_CASES
from nanovllm_kernels.silu_mul.cases import silu_mul_inputs
from nanovllm_kernels.skinny_matmul.cases import CASES as SKINNY_CASES
from nanovllm_kernels.skinny_matmul.cases import PRODUCTS, skinny_inputs

pytestmark = pytest.mark.gpu
TOLERANCE = {"bfloat16": 5e-3, "float16": 2e-3, "float32": 1e-5}


def is_for_mosaic(case):
    q = jax.ShapeDtypeStruct((case.num_tokens, case.num_heads, case.head_dim), jnp.dtype(case.dtype))
    cache_shape = (64, case.num_kv_heads, case.block_size, case.head_dim)
    k_cache = jax.ShapeDtypeStruct(cache_shape, jnp.dtype(case.cache_dtype or case.dtype))
    options = {"scale": 1.0, "sliding_window": case.sliding_window, "soft_cap": case.soft_cap}
    return mosaic_supports(q, k_cache, **options, compute_capability=90)


# Rows and keys by the thousand besides, where programs walk through many tiles and the ring goes round.
LONG = AttentionCase("long", (1500, 3000, 777, 1), 4, 2, 128, q_lens=(1500, 700, 1, 1), padding=40)
MOSAIC_CASES = [
    *filter(is_for_mosaic, PREFILL_CASES),
    LONG,
    dataclasses.replace(LONG, name="long_d64", head_dim=64, block_size=32),
    dataclasses.replace(LONG, name="long_multi_head", num_heads=2),
    dataclasses.replace(LONG, name="long_block_128", block_size=128, dtype="float16"),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Freed device memory holds NaN, so that an output row that nobody writes shows."""
    jax.block_until_ready(jnp.full((256, 1024, 1024), jnp.nan))


@pytest.mark.parametrize("case", WRITE_CASES, ids=lambda case: case.name)
def test_rope_cache_write(case):
    inputs, options = rope_cache_write_inputs(case)
    results = {
        backend: jax.jit(lambda *args, backend=backend: rope_cache_write(*args, **options, backend=backend))(*inputs)
        for backend in ("triton", "xla")
    }
    q, *caches = results["triton"]
    expected_q, *expected = write_oracle(*inputs, **options)
    assert relative_error(q, expected_q) < TOLERANCE[case.dtype]
    tolerance = 1 / 16 if case.cache_dtype == "float8_e4m3fn" else TOLERANCE[case.cache_dtype or case.dtype]
    for got, scale, stored in zip(caches, ("k_scale", "v_scale"), expected, strict=True):
        got = dequantised(np.asarray(got), options.get(scale)).reshape(-1, case.head_dim)
        assert relative_error(got, stored.reshape(-1, case.head_dim)) < tolerance
    # What is copied and what is kept is equal to the bit; float8 rounds as XLA does.
    np.testing.assert_array_equal(np.asarray(caches[1]).view(np.uint8), np.asarray(results["xla"][2]).view(np.uint8))


@pytest.mark.parametrize("added", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("case", NORM_CASES, ids=lambda case: case.name)
def test_add_rms_norm(case, added):
    x, update, weight = add_rms_norm_inputs(case)
    arrays = x, update if added else None, weight
    got = jax.jit(lambda *arrays: add_rms_norm(*arrays, eps=1e-6, backend="triton"))(*arrays)
    for one, expected in zip(got, add_rms_norm_oracle(*arrays, eps=1e-6), strict=True):
        assert relative_error(one, expected) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", SILU_CASES, ids=lambda case: case.name)
def test_silu_mul(case):
    gate_up = silu_mul_inputs(case)
    got = jax.jit(lambda gate_up: silu_mul(gate_up, backend="triton"))(gate_up)
    assert relative_error(got, silu_mul_oracle(gate_up)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", GATED_CASES, ids=lambda case: case.name)
def test_gated_matmul(case):
    arrays = gated_inputs(case)
    call = jax.jit(lambda arrays: gated_matmul(**arrays, backend="triton"))
    got = call(arrays)
    # Where gate and up are rounded first, that is one more rounding of each.
    assert relative_error(got, gated_oracle(**arrays)) < 2 * TOLERANCE[case.dtype]
    np.testing.assert_array_equal(np.asarray(call(arrays)), np.asarray(got))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_paged_decode(case, seed):
    inputs = attention_inputs(case, seed)
    got = jax.jit(lambda *args: paged_decode(*args, **case.options, backend="triton"))(*inputs.args)
    expected = decode_oracle(*inputs.args, **case.options)
    assert relative_error(got, expected) < TOLERANCE[case.dtype]
    assert not np.asarray(got)[inputs.context_lens == 0].any()


@pytest.mark.parametrize("in_kernel_merge", [False, True])
@pytest.mark.parametrize("case", ROPE_DECODE_CASES, ids=lambda case: case.name)
def test_rope_paged_decode(case, in_kernel_merge):
    args, options = rope_paged_decode_inputs(case)
    norms = {name: options.get(name) for name in ("q_norm", "k_norm", "eps", "k_scale", "v_scale")}

    # The same counters for all calls: each must find them at zero, and the newest token's slot may be written again.
    def calls(qkv, cos, sin, k_cache, v_cache, tables, lens):
        counters, outs = jax.new_ref(split_counters()) if in_kernel_merge else None, []
        for _ in range(5):
            out, k_cache, v_cache = rope_paged_decode(
                qkv, cos, sin, k_cache, v_cache, tables, lens, **options, counters=counters, backend="triton"
            )
            outs.append(out)
        return outs, k_cache, v_cache, jnp.zeros(1) if counters is None else counters[...]

    outs, k_cache, v_cache, counters = jax.jit(calls)(*args)
    slots = newest_slots(*map(jnp.asarray, args[5:]), case.block_size)
    write = jax.jit(lambda *args: rope_cache_write(*args, slots, **norms, backend="xla"))
    q, expected_k, expected_v = map(np.asarray, write(*args[:5]))
    expected_out = decode_oracle(q, expected_k, expected_v, *args[5:], **case.options)
    for out in outs:
        error = relative_error(out, expected_out)
        assert error < TOLERANCE[case.dtype]
        assert not np.asarray(out)[args[6] == 0].any()
    assert not np.asarray(counters).any()
    # Values are copied; of keys, float32 arithmetic in another order may be rounded to the next number.
    np.testing.assert_array_equal(np.asarray(v_cache).view(np.uint8), expected_v.view(np.uint8))
    got, expected = (np.nan_to_num(np.asarray(cache, np.float32)) for cache in (k_cache, expected_k))
    tolerance = 1 / 16 if case.cache_dtype == "float8_e4m3fn" else TOLERANCE[case.cache_dtype or case.dtype]
    assert relative_error(got.reshape(-1, case.head_dim), expected.reshape(-1, case.head_dim)) < tolerance


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", PREFILL_CASES, ids=lambda case: case.name)
def test_ragged_prefill(case, seed):
    inputs = attention_inputs(case, seed)
    got = jax.jit(lambda *args: ragged_prefill(*args, **case.options, backend="triton"))(*inputs.args)
    expected = prefill_oracle(*inputs.args, **case.options)
    assert relative_error(got, expected) < TOLERANCE[case.dtype]
    assert not np.asarray(got)[case.num_tokens - case.padding :].any()


@jax.jit
def draw(args, filters):
    return sample(*args, **filters, backend="triton")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("vocab_size", [1, 3, 130, 8193, 12_000, 49_152, 151_936])
def test_sample_of_hard_rows(vocab_size, seed):
    args, filters = hard_inputs(vocab_size, seed)
    assert_draws(draw(args, {}), *args)
    assert_draws(draw(args, filters), *args, **filters)


@pytest.mark.parametrize("case", SAMPLE_CASES, ids=lambda case: case.name)
def test_sample_of_benchmark_rows(case):
    args, filters = sample_inputs(case, seed=7)
    assert_draws(draw(args, filters), *args, **filters)


def test_sample_draws_the_same_in_any_batch():
    args, filters = hard_inputs(49_152)
    whole = np.asarray(draw(args, filters))
    for rows in (slice(0, 1), slice(5, 6), slice(3, 40), slice(None, None, -1)):
        part = [arg[rows] for arg in args], {name: value[rows] for name, value in filters.items()}
        np.testing.assert_array_equal(draw(*part), whole[rows])


@pytest.mark.parametrize("filtered", [False, True])
def test_sample_follows_the_distribution(filtered):
    draws, vocab_size = 40_000, 300
    logits = np.broadcast_to(np.random.default_rng(0).normal(size=vocab_size).astype(np.float32), (draws, vocab_size))
    key = np.broadcast_to(np.array([1, 2], np.uint32), (draws, 2))
    ones = np.ones(draws, np.float32)
    filters = {"top_k": np.full(draws, 50, np.int32), "top_p": 0.8 * ones, "min_p": 0 * ones} if filtered else {}
    tokens = np.asarray(draw((logits, ones, key, np.arange(draws, dtype=np.int32)), filters))
    weights = np.exp(logits[0].astype(np.float64)) * (kept(logits[0], top_k=50, top_p=0.8) if filtered else 1)
    counts, expected = np.bincount(tokens, minlength=vocab_size), draws * weights / weights.sum()
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-4


@pytest.mark.parametrize("in_kernel_merge", [False, True])
@pytest.mark.parametrize("case", SKINNY_CASES, ids=lambda case: case.name)
def test_skinny_matmul(case, in_kernel_merge):
    def call(arrays):
        counters = jax.new_ref(split_counters()) if in_kernel_merge else None
        return skinny_matmul(**arrays, **case.options, counters=counters, backend="triton")

    for seed in (0, 1):
        arrays = skinny_inputs(case, seed)
        got = jax.jit(call)(arrays)
        assert relative_error(got, skinny_oracle(arrays, case)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 64, 100, 256])
@pytest.mark.parametrize(
    "case", [*PRODUCTS["qwen3_0_6b"], *PRODUCTS["qwen3_8b_tp4"]], ids=lambda case: f"{case.name}-{case.outputs}"
)
def test_skinny_matmul_with_the_launches_of_a_model(case, rows):
    case = dataclasses.replace(case, rows=rows)
    arrays = skinny_inputs(case)

    # The same counters for all calls: each must find them at zero. Sums in a fixed order repeat to the bit.
    def calls(arrays):
        counters = jax.new_ref(split_counters())
        one = lambda: skinny_matmul(**arrays, **case.options, counters=counters, backend="triton")  # noqa: E731
        return [one() for _ in range(20)], counters[...]

    got, counters = jax.jit(calls)(arrays)
    assert not np.asarray(counters).any()
    assert relative_error(got[0], skinny_oracle(arrays, case)) < 5e-3
    for other in got[1:]:
        np.testing.assert_array_equal(np.asarray(other), np.asarray(got[0]))


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case.name)
def test_decode_layers(case):
    call = jax.jit(lambda *args: decode_layers(*args, **case.options, backend="triton"))
    for seed in (0, 1):
        inputs = layer_inputs(case, seed)
        results = [call(*inputs) for _ in range(100)]
        x, caches = layers_oracle(*inputs, **case.options)
        assert relative_error(results[0][0], x) < 1e-2
        for got, cache in zip(jax.tree.leaves(results[0][1]), jax.tree.leaves(caches), strict=True):
            seen = ~np.isnan(cache)
            got = np.asarray(got, np.float64)
            assert not np.isnan(got[seen]).any()
            assert np.isnan(got[~seen]).all()
            assert relative_error(got[seen][None], cache[seen][None]) < 1e-2
        # Sums in a fixed order repeat to the bit.
        for other in results[1:]:
            for got, first in zip(jax.tree.leaves(other), jax.tree.leaves(results[0]), strict=True):
                np.testing.assert_array_equal(np.asarray(got).view(np.uint16), np.asarray(first).view(np.uint16))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", MOSAIC_CASES, ids=lambda case: case.name)
def test_ragged_prefill_mosaic(case, seed):
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("Mosaic kernels are for sm_90")
    inputs = attention_inputs(case, seed)
    got = jax.jit(lambda *args: ragged_prefill(*args, **case.options, backend="mosaic"))(*inputs.args)
    expected = prefill_oracle(*inputs.args, **case.options)
    assert relative_error(got, expected) < TOLERANCE[case.dtype]
    assert not np.asarray(got)[case.num_tokens - case.padding :].any()


def test_last_block_of_a_cache_with_more_than_2_to_31_elements():
    num_blocks, kv_heads, block_size, head_dim = 2**17 + 3, 8, 16, 128
    shape = (num_blocks, kv_heads, block_size, head_dim)
    assert np.prod(shape, dtype=np.int64) > 2**31
    rng = np.random.default_rng(0)
    length = block_size
    qkv = rng.standard_normal((length, kv_heads, 4, head_dim)).astype(jnp.bfloat16)
    q, k, v = qkv[:, :, :2].reshape(length, -1, head_dim), qkv[:, :, 2], qkv[:, :, 3]
    slots = (num_blocks - 1) * block_size + np.arange(length, dtype=np.int32)
    table = np.full((1, 4), num_blocks - 1, np.int32)
    lens = np.array([length], np.int32)

    def step(k_cache, v_cache, qkv, cos, sin, slots, table, cu_q_lens, lens):
        q, *caches = rope_cache_write(qkv, cos, sin, k_cache, v_cache, slots, backend="triton")
        options = {"scale": head_dim**-0.5, "backend": "triton"}
        prefilled = ragged_prefill(q, *caches, table, cu_q_lens, lens, **options)
        decoded = paged_decode(q[-1:], *caches, table, lens, **options)
        return *caches, prefilled, decoded

    caches = [jnp.full(shape, jnp.nan, jnp.bfloat16) for _ in range(2)]
    addresses = [cache.unsafe_buffer_pointer() for cache in caches]
    cu_q_lens = np.array([0, length], np.int32)
    angle = np.zeros((length, head_dim // 2), np.float32)
    args = qkv, angle + 1, angle, slots, table, cu_q_lens, lens
    k_cache, v_cache, prefilled, decoded = jax.jit(step, donate_argnums=(0, 1))(*caches, *args)
    # Donated, the caches keep their memory: 4.3 GB each are not copied.
    assert [cache.unsafe_buffer_pointer() for cache in (k_cache, v_cache)] == addresses
    np.testing.assert_array_equal(np.asarray(k_cache[-1]), k.swapaxes(0, 1))
    np.testing.assert_array_equal(np.asarray(v_cache[-1]), v.swapaxes(0, 1))
    small_k, small_v = (x.swapaxes(0, 1)[None] for x in (k, v))
    expected = prefill_oracle(
        q,
        small_k,
        small_v,
        np.zeros((1, 1), np.int32),
        cu_q_lens,
        lens,
        scale=head_dim**-0.5,
        sliding_window=None,
        soft_cap=None,
    )
    assert relative_error(prefilled, expected) < 5e-3
    assert relative_error(decoded, expected[-1:]) < 5e-3


def test_add_shards():
    """Sums of all shapes in turn, 100 times; each shard gets the same bits."""
    shards = jax.local_device_count()
    if shards not in (2, 4, 8):
        pytest.skip(f"needs 2, 4 or 8 GPUs, not {shards}")
    mesh = jax.make_mesh((shards,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    exchange, split, same = make_exchange(mesh, "model"), PartitionSpec("model"), PartitionSpec()

    def add(parts, residuals, table):
        wanted = [residual if case.residual else None for case, residual in zip(SUM_CASES, residuals, strict=True)]
        options = {"axis_name": "model", "table": table, "backend": "triton"}
        sums, earlier = [], jnp.float32(0)
        for part, residual in zip(parts, wanted, strict=True):
            part, _ = jax.lax.optimization_barrier((part[0], earlier))  # one after the other on every shard
            sums.append(add_shards(part, residual, **options))
            earlier = sums[-1].astype(jnp.float32).sum()
        return [each[None] for each in sums]

    specs = (split, same, split)
    step = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False))
    for seed in range(100):
        random = np.random.default_rng(seed)
        arrays = [random.normal(size=(shards + 1, case.rows, case.width)).astype(case.dtype) for case in SUM_CASES]
        sums = step([each[:-1] for each in arrays], [each[-1] for each in arrays], exchange.table)
        for case, drawn, got in zip(SUM_CASES, arrays, map(np.asarray, sums), strict=True):
            assert (got.view(np.uint16) == got[:1].view(np.uint16)).all(), case
            want = drawn[: shards + case.residual].astype(np.float64).sum(axis=0)
            assert relative_error(got[0], want) < TOLERANCE[case.dtype], case
    assert programs_that_failed(exchange) == 0
