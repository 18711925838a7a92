"""Attention and cache kernels on a real GPU: `pytest -m gpu tests/kernels`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_oracle import GPU_TOLERANCE, decode_oracle, dequantised, prefill_oracle, relative_error, write_oracle

from nanovllm_kernels import paged_decode, ragged_prefill, rope_cache_write, rope_paged_decode, split_counters
from nanovllm_kernels._cases import AttentionCase, attention_inputs
from nanovllm_kernels.paged_decode.cases import CASES as DECODE_CASES
from nanovllm_kernels.ragged_prefill import mosaic_supports
from nanovllm_kernels.ragged_prefill.cases import CASES as PREFILL_CASES
from nanovllm_kernels.rope_cache_write.cases import CASES as WRITE_CASES
from nanovllm_kernels.rope_cache_write.cases import rope_cache_write_inputs
from nanovllm_kernels.rope_paged_decode.cases import CASES as ROPE_DECODE_CASES
from nanovllm_kernels.rope_paged_decode.cases import rope_paged_decode_inputs
from nanovllm_kernels.rope_paged_decode.reference import newest_slots

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("case", WRITE_CASES, ids=lambda case: case.name)
def test_rope_cache_write(case):
    inputs, options = rope_cache_write_inputs(case)
    results = {
        backend: jax.jit(lambda *args, backend=backend: rope_cache_write(*args, **options, backend=backend))(*inputs)
        for backend in ("triton", "xla")
    }
    q, *caches = results["triton"]
    expected_q, *expected = write_oracle(*inputs, **options)
    assert relative_error(q, expected_q) < GPU_TOLERANCE[case.dtype]
    tolerance = 1 / 16 if case.cache_dtype == "float8_e4m3fn" else GPU_TOLERANCE[case.cache_dtype or case.dtype]
    for got, scale, stored in zip(caches, ("k_scale", "v_scale"), expected, strict=True):
        got = dequantised(np.asarray(got), options.get(scale)).reshape(-1, case.head_dim)
        assert relative_error(got, stored.reshape(-1, case.head_dim)) < tolerance
    # What is copied and what is kept is equal to the bit; float8 rounds as XLA does.
    np.testing.assert_array_equal(np.asarray(caches[1]).view(np.uint8), np.asarray(results["xla"][2]).view(np.uint8))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_paged_decode(case, seed):
    inputs = attention_inputs(case, seed)
    got = jax.jit(lambda *args: paged_decode(*args, **case.options, backend="triton"))(*inputs.args)
    expected = decode_oracle(*inputs.args, **case.options)
    assert relative_error(got, expected) < GPU_TOLERANCE[case.dtype]
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
        assert error < GPU_TOLERANCE[case.dtype]
        assert not np.asarray(out)[args[6] == 0].any()
    assert not np.asarray(counters).any()
    # Values are copied; of keys, float32 arithmetic in another order may be rounded to the next number.
    np.testing.assert_array_equal(np.asarray(v_cache).view(np.uint8), expected_v.view(np.uint8))
    got, expected = (np.nan_to_num(np.asarray(cache, np.float32)) for cache in (k_cache, expected_k))
    tolerance = 1 / 16 if case.cache_dtype == "float8_e4m3fn" else GPU_TOLERANCE[case.cache_dtype or case.dtype]
    assert relative_error(got.reshape(-1, case.head_dim), expected.reshape(-1, case.head_dim)) < tolerance


@pytest.mark.parametrize(
    ("lengths", "heads"),
    [
        # On an H200 each consumer of the Mosaic kernel has two or three pieces, and queries are made a piece ahead.
        (np.random.default_rng(5).integers(200, 1200, 80).tolist(), (16, 8)),
        (np.random.default_rng(5).integers(200, 2400, 64).tolist(), (8, 2)),  # nearly all are cut
        ([300] * 63 + [32768], (8, 2)),  # one in more pieces than a merge reads at a time
        ([300] * 63 + [8192], (12, 2)),
    ],
    ids=["mixed", "mixed_2_kv_heads", "a_long_row", "a_long_row_of_6_heads"],
)
def test_rope_paged_decode_is_right_and_gives_the_same_bits_in_every_call(lengths, heads):
    case = AttentionCase("mixed", tuple(lengths), *heads, 128)
    args, options = rope_paged_decode_inputs(case)
    norms = {name: options.get(name) for name in ("q_norm", "k_norm", "eps")}

    def call(qkv, cos, sin, k_cache, v_cache, tables, lens):
        counters = jax.new_ref(split_counters())
        return rope_paged_decode(
            qkv, cos, sin, k_cache, v_cache, tables, lens, **options, counters=counters, backend="triton"
        )

    compiled = jax.jit(call, donate_argnums=(3, 4))
    qkv, cos, sin, k_cache, v_cache, *rest = map(jnp.asarray, args)
    slots = newest_slots(*rest, case.block_size)
    write = jax.jit(lambda *args: rope_cache_write(*args, slots, **norms, backend="xla"))
    q, *caches = map(np.asarray, write(qkv, cos, sin, k_cache, v_cache))
    outs = []
    for _ in range(200):
        out, k_cache, v_cache = compiled(qkv, cos, sin, k_cache, v_cache, *rest)
        outs.append(out)
    assert all(np.array_equal(out, outs[0]) for out in outs)
    expected = decode_oracle(q, *caches, *args[5:], **case.options)
    assert relative_error(outs[0], expected) < GPU_TOLERANCE[case.dtype]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", PREFILL_CASES, ids=lambda case: case.name)
def test_ragged_prefill(case, seed):
    inputs = attention_inputs(case, seed)
    got = jax.jit(lambda *args: ragged_prefill(*args, **case.options, backend="triton"))(*inputs.args)
    expected = prefill_oracle(*inputs.args, **case.options)
    assert relative_error(got, expected) < GPU_TOLERANCE[case.dtype]
    assert not np.asarray(got)[case.num_tokens - case.padding :].any()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", MOSAIC_CASES, ids=lambda case: case.name)
def test_ragged_prefill_mosaic(case, seed):
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("Mosaic kernels are for sm_90")
    inputs = attention_inputs(case, seed)
    got = jax.jit(lambda *args: ragged_prefill(*args, **case.options, backend="mosaic"))(*inputs.args)
    expected = prefill_oracle(*inputs.args, **case.options)
    assert relative_error(got, expected) < GPU_TOLERANCE[case.dtype]
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
