import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config as jaxtyping_config
from kernel_oracle import write_oracle

from nanovllm_kernels import cache_write, paged_decode
from nanovllm_kernels.cache_write.cases import CASES, cache_write_inputs

write = jax.jit(lambda *args: cache_write(*args, backend="xla"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_token_lands_in_its_slot_and_nothing_else_changes(case):
    inputs = cache_write_inputs(case)
    for got, expected in zip(write(*inputs), write_oracle(*inputs), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(got), expected)


@settings(deadline=None, max_examples=50)
@given(
    slots=st.lists(st.integers(0, 5 * 8 - 1) | st.integers(-(2**31), -1), min_size=6, max_size=6).filter(
        lambda slots: len({s for s in slots if s >= 0}) == sum(s >= 0 for s in slots)
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_negative_slots_are_never_written(slots, seed):
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, 6, 2, 16), np.float32).astype(ml_dtypes.bfloat16)
    k_cache, v_cache = rng.standard_normal((2, 5, 2, 8, 16), np.float32).astype(ml_dtypes.bfloat16)
    inputs = k, v, k_cache, v_cache, np.array(slots, np.int32)
    for got, expected in zip(write(*inputs), write_oracle(*inputs), strict=True):
        np.testing.assert_array_equal(np.asarray(got), expected)


def test_slots_past_the_cache_are_dropped():
    k = jnp.ones((2, 1, 16))
    cache = jnp.zeros((2, 1, 8, 16))
    k_cache, v_cache = write(k, k, cache, cache, jnp.array([16, 2**31 - 1], jnp.int32))
    assert not k_cache.any()
    assert not v_cache.any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_donated_caches_are_updated_in_place_through_layers(dtype):
    # A decode step of two layers: each writes, then reads what it wrote, and feeds the next.
    shape = (1024, 2, 16, 32)
    caches = [jnp.zeros(shape, dtype) for _ in range(4)]
    tables = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    lens = jnp.array([3, 40], jnp.int32)

    def step(caches, x):
        slots = jnp.array([2, 4 * 16 + 39], jnp.int32)
        out = []
        for layer in range(2):
            layer_caches = cache_write(x, x, *caches[2 * layer : 2 * layer + 2], slots, backend="xla")
            x = paged_decode(x, *layer_caches, tables, lens, scale=1.0, backend="xla")
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
        k, cache, slots = jnp.ones((3, 2, 16)), jnp.zeros((4, 2, 8, 16)), jnp.zeros(3, jnp.int32)

        def call(k=k, v=k, k_cache=cache, v_cache=cache, slots=slots, backend="xla"):
            return cache_write(k, v, k_cache, v_cache, slots, backend=backend)

        for wrong, words in (
            ({"backend": "cuda"}, "backend is 'cuda'; it must be 'xla' or 'triton'"),
            ({"k": jnp.ones((3, 1, 16))}, r"k has shape \(3, 1, 16\); it must be \[T, K, D\] = \(3, 2, 16\)"),
            ({"v_cache": cache[:2]}, r"v_cache has shape \(2, 2, 8, 16\)"),
            ({"v_cache": cache.astype(jnp.bfloat16)}, "k_cache is float32 and v_cache bfloat16"),
            ({"k": jnp.ones((3, 2, 16), jnp.int32)}, "k has dtype int32; the kernels take float32"),
            ({"slots": jnp.zeros(3, jnp.uint32)}, "slots has dtype uint32; it must be int32"),
            ({"slots": jnp.zeros((3, 1), jnp.int32)}, r"slots has shape \(3, 1\); it must be \[T\]"),
        ):
            with pytest.raises(ValueError, match=words):
                call(**wrong)
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
