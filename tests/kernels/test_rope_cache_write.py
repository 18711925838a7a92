import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config as jaxtyping_config
from kernel_oracle import dequantised, relative_error, write_oracle

from nanovllm_kernels import paged_decode, rope_cache_write
from nanovllm_kernels.rope_cache_write.cases import CASES, rope_cache_write_inputs

# float8 has 3 mantissa bits: half a unit in the last place is a sixteenth.
TOLERANCE = {"float8_e4m3fn": 1 / 16, "bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-6}


def write(*args, **options):
    return jax.jit(lambda *args: rope_cache_write(*args, **options, backend="xla"))(*args)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_queries_keys_and_values_are_normed_rotated_and_stored(case):
    inputs, options = rope_cache_write_inputs(case)
    q, k_cache, v_cache = write(*inputs, **options)
    expected_q, expected_k, expected_v = write_oracle(*inputs, **options)
    assert relative_error(q, expected_q) < TOLERANCE[case.dtype]
    for got, scale, expected in ((k_cache, "k_scale", expected_k), (v_cache, "v_scale", expected_v)):
        stored = dequantised(np.asarray(got), options.get(scale))
        assert relative_error(stored.reshape(-1, case.head_dim), expected.reshape(-1, case.head_dim)) < max(
            TOLERANCE[case.cache_dtype or case.dtype], TOLERANCE[case.dtype]
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_slots_of_no_token_keep_what_they_hold_bit_by_bit(case):
    inputs, options = rope_cache_write_inputs(case)
    written = np.zeros((inputs[3].shape[0], case.block_size), bool)
    slots = inputs[5][inputs[5] >= 0]
    written[slots // case.block_size, slots % case.block_size] = True
    for got, before in zip(write(*inputs, **options)[1:], inputs[3:5], strict=True):
        kept = ~written[:, None].repeat(case.num_kv_heads, 1)
        np.testing.assert_array_equal(np.asarray(got)[kept].view(np.uint8), before[kept].view(np.uint8))


@settings(deadline=None, max_examples=50)
@given(
    slots=st.lists(st.integers(0, 5 * 8 - 1) | st.integers(-(2**31), -1), min_size=6, max_size=6).filter(
        lambda slots: len({s for s in slots if s >= 0}) == sum(s >= 0 for s in slots)
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_values_land_unchanged_in_their_slots_and_negative_slots_are_never_written(slots, seed):
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((6, 2, 3, 16), np.float32).astype(ml_dtypes.bfloat16)
    k_cache, v_cache = rng.standard_normal((2, 5, 2, 8, 16), np.float32).astype(ml_dtypes.bfloat16)
    angle = np.zeros((6, 8), np.float32)
    inputs = qkv, angle + 1, angle, k_cache, v_cache, np.array(slots, np.int32)
    q, *caches = write(*inputs)
    expected_q, *expected = write_oracle(*inputs, eps=0)
    np.testing.assert_array_equal(np.asarray(q).astype(np.float64), expected_q)  # turned by nothing
    for got, stored in zip(caches, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got).astype(np.float64), stored)


def test_slots_past_the_cache_are_dropped():
    cache, angle = jnp.zeros((2, 1, 8, 16)), jnp.ones((2, 8))
    _, k_cache, v_cache = write(jnp.ones((2, 1, 3, 16)), angle, angle, cache, cache, jnp.array([16, 2**31 - 1]))
    assert not k_cache.any()
    assert not v_cache.any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_donated_caches_are_updated_in_place_through_layers(dtype):
    # A decode step of two layers: each writes, then reads what it wrote, and feeds the next.
    shape = (1024, 2, 16, 32)
    caches = [jnp.zeros(shape, dtype) for _ in range(4)]
    tables = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    lens = jnp.array([3, 40], jnp.int32)
    angle = jnp.ones((2, 16))

    def step(caches, x):
        slots = jnp.array([2, 4 * 16 + 39], jnp.int32)
        out = []
        for layer in range(2):
            qkv = jnp.broadcast_to(x[:, :, None], (2, 2, 3, 32))
            q, *layer_caches = rope_cache_write(
                qkv, angle, angle, *caches[2 * layer : 2 * layer + 2], slots, backend="xla"
            )
            x = paged_decode(q, *layer_caches, tables, lens, scale=1.0, backend="xla")
            out += layer_caches
        return out, x

    compiled = jax.jit(step, donate_argnums=0).lower(caches, jnp.ones((2, 2, 32), dtype)).compile()
    memory = compiled.memory_analysis()
    one_cache = caches[0].nbytes
    assert memory.alias_size_in_bytes >= 4 * one_cache
    assert memory.temp_size_in_bytes < one_cache // 2


def test_wrong_arguments_are_refused_with_what_was_got_and_what_is_allowed():
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        qkv, cache, slots = jnp.ones((3, 2, 4, 16)), jnp.zeros((4, 2, 8, 16)), jnp.zeros(3, jnp.int32)
        angle, norm, scale = jnp.ones((3, 8)), jnp.ones(16), jnp.ones(2)

        def call(qkv=qkv, cos=angle, k_cache=cache, v_cache=cache, slots=slots, backend="xla", **options):
            return rope_cache_write(qkv, cos, angle, k_cache, v_cache, slots, **options, backend=backend)

        for wrong, words in (
            ({"backend": "cuda"}, "backend is 'cuda'; it must be 'xla' or 'triton'"),
            ({"qkv": jnp.ones((3, 1, 4, 16))}, r"qkv has shape \(3, 1, 4, 16\); it must be \[T, K, G \+ 2, D\]"),
            ({"qkv": jnp.ones((3, 2, 2, 16))}, "at least one query head"),
            ({"cos": jnp.ones((3, 16))}, r"cos has shape \(3, 16\); it must be \[T, D / 2\] = \(3, 8\)"),
            ({"q_norm": norm}, "q_norm and k_norm go together"),
            ({"q_norm": norm[:3], "k_norm": norm}, r"q_norm has shape \(3,\)"),
            ({"k_scale": scale}, "k_scale and v_scale go together"),
            ({"k_scale": scale, "v_scale": scale}, "k_scale is given, but the cache is float32"),
            ({"v_cache": cache[:2]}, r"v_cache has shape \(2, 2, 8, 16\)"),
            ({"v_cache": cache.astype(jnp.bfloat16)}, "k_cache is float32 and v_cache bfloat16"),
            ({"qkv": jnp.ones((3, 2, 4, 16), jnp.int32)}, "qkv has dtype int32; the kernels take float32"),
            ({"slots": jnp.zeros(3, jnp.uint32)}, "slots has dtype uint32; it must be int32"),
            ({"slots": jnp.zeros((3, 1), jnp.int32)}, r"slots has shape \(3, 1\); it must be \[T\]"),
        ):
            with pytest.raises(ValueError, match=words):
                call(**wrong)
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
