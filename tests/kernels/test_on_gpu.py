"""The Triton and Mosaic kernels on a real GPU: `pytest -m gpu tests/kernels`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_oracle import decode_oracle, prefill_oracle, relative_error, write_oracle

from nanovllm_kernels import cache_write, paged_decode, ragged_prefill
from nanovllm_kernels._cases import AttentionCase, attention_inputs
from nanovllm_kernels.cache_write.cases import CASES as WRITE_CASES
from nanovllm_kernels.cache_write.cases import cache_write_inputs
from nanovllm_kernels.paged_decode.cases import CASES as DECODE_CASES
from nanovllm_kernels.ragged_prefill import mosaic_supports
from nanovllm_kernels.ragged_prefill.cases import CASES as PREFILL_CASES

pytestmark = pytest.mark.gpu
TOLERANCE = {"bfloat16": 5e-3, "float16": 2e-3, "float32": 1e-5}


def is_for_mosaic(case):
    q = jax.ShapeDtypeStruct((case.num_tokens, case.num_heads, case.head_dim), jnp.dtype(case.dtype))
    k_cache = jax.ShapeDtypeStruct((64, case.num_kv_heads, case.block_size, case.head_dim), q.dtype)
    return mosaic_supports(q, k_cache, **case.options, compute_capability=90)


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
def test_cache_write(case):
    inputs = cache_write_inputs(case)
    written = jax.jit(lambda *args: cache_write(*args, backend="triton"))(*inputs)
    for got, expected in zip(written, write_oracle(*inputs), strict=True):
        np.testing.assert_array_equal(np.asarray(got), expected)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_paged_decode(case, seed):
    inputs = attention_inputs(case, seed)
    got = jax.jit(lambda *args: paged_decode(*args, **case.options, backend="triton"))(*inputs.args)
    expected = decode_oracle(*inputs.args, **case.options)
    assert relative_error(got, expected) < TOLERANCE[case.dtype]
    assert not np.asarray(got)[inputs.context_lens == 0].any()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", PREFILL_CASES, ids=lambda case: case.name)
def test_ragged_prefill(case, seed):
    inputs = attention_inputs(case, seed)
    got = jax.jit(lambda *args: ragged_prefill(*args, **case.options, backend="triton"))(*inputs.args)
    expected = prefill_oracle(*inputs.args, **case.options)
    assert relative_error(got, expected) < TOLERANCE[case.dtype]
    assert not np.asarray(got)[case.num_tokens - case.padding :].any()


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
    q = rng.standard_normal((length, 2 * kv_heads, head_dim)).astype(jnp.bfloat16)
    k, v = rng.standard_normal((2, length, kv_heads, head_dim)).astype(jnp.bfloat16)
    slots = (num_blocks - 1) * block_size + np.arange(length, dtype=np.int32)
    table = np.full((1, 4), num_blocks - 1, np.int32)
    lens = np.array([length], np.int32)

    def step(k_cache, v_cache, q, k, v, slots, table, cu_q_lens, lens):
        caches = cache_write(k, v, k_cache, v_cache, slots, backend="triton")
        options = {"scale": head_dim**-0.5, "backend": "triton"}
        prefilled = ragged_prefill(q, *caches, table, cu_q_lens, lens, **options)
        decoded = paged_decode(q[-1:], *caches, table, lens, **options)
        return *caches, prefilled, decoded

    caches = [jnp.full(shape, jnp.nan, jnp.bfloat16) for _ in range(2)]
    addresses = [cache.unsafe_buffer_pointer() for cache in caches]
    cu_q_lens = np.array([0, length], np.int32)
    args = q, k, v, slots, table, cu_q_lens, lens
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
