import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config as jaxtyping_config
from kernel_oracle import decode_oracle, relative_error

from nanovllm_kernels import paged_decode
from nanovllm_kernels._cases import AttentionCase, attention_inputs
from nanovllm_kernels.paged_decode.cases import CASES
from nanovllm_kernels.paged_decode.plan import plan_pieces

# The reference takes any shape the same way, so a few stand for all; lengths and contents vary in each.
NAMES = ("smollm2", "multi_query", "block_8", "block_256", "float16", "window", "float32_soft_cap")
SHAPES = [case for case in CASES if case.name in NAMES]
TOLERANCE = {"bfloat16": 5e-3, "float16": 2e-3, "float32": 1e-5}
MAX_LENGTH = 270
TILE_TOKENS = 64


@functools.cache
def jitted(case: AttentionCase):
    return jax.jit(lambda *args: paged_decode(*args, **case.options, backend="xla"))


def shape_of(case: AttentionCase) -> AttentionCase:
    """The case without its lengths: what its compiled program depends on."""
    return AttentionCase(**{**vars(case), "context_lens": ()})


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
@settings(deadline=None, max_examples=12)
@given(
    lengths=st.tuples(*[st.integers(0, MAX_LENGTH) | st.sampled_from([0, 1, 127, 128, 129])] * 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_matches_the_oracle_and_reads_no_slot_past_the_context(case, lengths, seed):
    problem = AttentionCase(**{**vars(case), "context_lens": lengths})
    blocks = -(-MAX_LENGTH // case.block_size)
    inputs = attention_inputs(problem, seed, num_blocks=4 * blocks + 1, table_width=blocks + 1)
    got = np.asarray(jitted(shape_of(case))(*inputs.args))
    expected = decode_oracle(*inputs.args, **case.options)
    assert got.dtype == inputs.q.dtype
    assert relative_error(got, expected) < TOLERANCE[case.dtype]
    assert not got[np.array(lengths) == 0].any()


def test_float32_queries_over_a_bfloat16_cache_lose_nothing():
    case = AttentionCase("mixed", (100, 33), 4, 2, 64)
    inputs = attention_inputs(case)
    args = (inputs.q.astype(np.float32), *inputs.args[1:])
    assert relative_error(jitted(case)(*args), decode_oracle(*args, **case.options)) < 1e-5


def test_memory_follows_a_chunk_and_not_the_width_of_the_block_table():
    cache = jax.ShapeDtypeStruct((256, 2, 16, 64), jnp.float32)
    arguments = (
        jax.ShapeDtypeStruct((8, 4, 64), jnp.float32),
        cache,
        cache,
        jax.ShapeDtypeStruct((8, 4096), jnp.int32),
        jax.ShapeDtypeStruct((8,), jnp.int32),
    )
    compiled = jax.jit(lambda *args: paged_decode(*args, scale=1.0, backend="xla")).lower(*arguments).compile()
    whole_table = 8 * 4096 * 16 * 2 * 64 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole_table // 20


def test_wrong_arguments_are_refused_with_what_was_got_and_what_is_allowed():
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        q, cache = jnp.ones((2, 4, 16)), jnp.zeros((4, 2, 8, 16))
        tables, lens = jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32)

        def call(q=q, k_cache=cache, tables=tables, lens=lens, backend="xla", **options):
            return paged_decode(q, k_cache, cache, tables, lens, scale=1.0, backend=backend, **options)

        for wrong, words in (
            ({"backend": "cuda"}, "backend is 'cuda'"),
            ({"q": jnp.ones((2, 3, 16))}, "q has 3 query heads, which is not a multiple of the cache's 2 KV"),
            ({"q": jnp.ones((2, 4, 8))}, r"q has shape \(2, 4, 8\)"),
            ({"k_cache": cache[0]}, r"k_cache has shape \(2, 8, 16\)"),
            ({"tables": tables[:1]}, r"block_tables has shape \(1, 3\)"),
            ({"lens": lens[:1]}, r"context_lens has shape \(1,\); it must be \[B\] = \(2,\)"),
            ({"lens": lens.astype(jnp.float32)}, "context_lens has dtype float32; it must be int32"),
            ({"sliding_window": 0}, "sliding_window is 0; it must be at least 1"),
            ({"soft_cap": 0.0}, "soft_cap is 0.0; it must be above 0"),
        ):
            with pytest.raises(ValueError, match=words):
                call(**wrong)
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


def test_triton_without_a_gpu_says_what_to_do():
    inputs = attention_inputs(AttentionCase("any", (5,), 2, 1, 16))
    with pytest.raises(RuntimeError, match="use backend='xla'"):
        paged_decode(*map(jnp.asarray, inputs.args), scale=1.0, backend="triton")


@functools.cache
def jitted_plan(num_rows, window, most_pieces):
    return jax.jit(functools.partial(plan_pieces, window=window, tile_tokens=TILE_TOKENS, most_pieces=most_pieces))


@settings(deadline=None, max_examples=60)
@given(
    contexts=st.lists(st.integers(0, 40) | st.integers(0, 5000), min_size=9, max_size=9),
    window=st.sampled_from([0, 100]),
    most_pieces=st.sampled_from([1, 2, 9, 66]),
)
def test_pieces_cover_each_row_once_and_the_longest_come_first(contexts, window, most_pieces):
    pieces, cuts = map(np.asarray, jitted_plan(9, window, most_pieces)(jnp.array(contexts, jnp.int32)))
    assert len(pieces) == 9 + most_pieces
    real = pieces[pieces[:, 0] >= 0]
    np.testing.assert_array_equal(pieces[: len(real)], real)
    lengths = []
    for row, context in enumerate(contexts):
        (mine,) = np.nonzero(real[:, 0] == row)
        np.testing.assert_array_equal(mine, np.arange(mine[0], mine[0] + len(mine)))
        first = max(context - window, 0) // TILE_TOKENS * TILE_TOKENS if window else 0
        edges = [first, *real[mine, 3]]
        np.testing.assert_array_equal(real[mine, 2], edges[:-1])
        assert edges[-1] == context
        assert set(real[mine, 1]) == {context}
        assert set(real[mine, 4]) == {len(mine) == 1}
        assert [*map(tuple, real[mine, 6:])] == [(mine[0], len(mine))] * len(mine)
        if len(mine) > 1:
            assert cuts[real[mine, 5]].tolist() == [[row, mine[0], len(mine)]] * len(mine)
        assert (len(mine) > 1) == ([row, mine[0], len(mine)] in cuts.tolist())
        lengths += [(mine[0], -(-(edges[1] - edges[0]) // TILE_TOKENS))]
    assert np.count_nonzero(cuts[:, 2]) == sum(np.bincount(real[:, 0]) > 1)
    in_order = [length for _, length in sorted(lengths)]
    assert in_order == sorted(in_order, reverse=True)


def test_a_cache_whose_rows_32_bits_do_not_count_is_refused():
    cache = jax.ShapeDtypeStruct((2**24, 8, 16, 16), jnp.bfloat16)
    index = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    args = (jax.ShapeDtypeStruct((1, 16, 16), jnp.bfloat16), cache, cache, index((1, 4)), index((1,)))
    with pytest.raises(ValueError, match=r"k_cache has shape .*; N \* K \* block_size must be below 2\^31"):
        jax.eval_shape(functools.partial(paged_decode, scale=1.0, backend="xla"), *args)
