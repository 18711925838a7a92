import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config as jaxtyping_config
from kernel_oracle import prefill_oracle, relative_error

from nanovllm_kernels import paged_decode, ragged_prefill
from nanovllm_kernels._cases import AttentionCase, attention_inputs
from nanovllm_kernels.ragged_prefill.cases import CASES

# The reference takes any shape the same way, so a few stand for all; lengths and contents vary in each.
NAMES = ("smollm2", "multi_head", "block_8", "block_256", "float16", "window", "float32_soft_cap")
SHAPES = [case for case in CASES if case.name in NAMES]
TOLERANCE = {"bfloat16": 5e-3, "float16": 2e-3, "float32": 1e-5}
NUM_TOKENS, NUM_SEQS, MAX_PREFIX = 80, 4, 150


@functools.cache
def jitted(case: AttentionCase):
    return jax.jit(lambda *args: ragged_prefill(*args, **case.options, backend="xla"))


def shape_of(case: AttentionCase) -> AttentionCase:
    """The case without its lengths: what its compiled program depends on."""
    return AttentionCase(**{**vars(case), "context_lens": (), "q_lens": (), "padding": 0})


@st.composite
def lengths(draw):
    """New tokens and prefix of each sequence: whole prompts, chunks, decode rows and unused sequences."""
    left, q_lens, prefixes = NUM_TOKENS, [], []
    for _ in range(NUM_SEQS):
        q_lens.append(draw(st.sampled_from([0, min(1, left), left]) | st.integers(0, left)))
        prefixes.append(draw(st.just(0) | st.integers(0, MAX_PREFIX)))
        left -= q_lens[-1]
    return tuple(q_lens), tuple(prefixes), left


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
@settings(deadline=None, max_examples=12)
@given(lengths=lengths(), seed=st.integers(0, 2**32 - 1))
def test_matches_the_oracle_and_reads_no_slot_past_the_context(case, lengths, seed):
    q_lens, prefixes, padding = lengths
    contexts = tuple(q_len + prefix for q_len, prefix in zip(q_lens, prefixes, strict=True))
    problem = AttentionCase(**{**vars(case), "context_lens": contexts, "q_lens": q_lens, "padding": padding})
    blocks = -(-(NUM_TOKENS + MAX_PREFIX) // case.block_size)
    inputs = attention_inputs(problem, seed, num_blocks=NUM_SEQS * blocks, table_width=blocks + 1)
    got = np.asarray(jitted(shape_of(case))(*inputs.args))
    expected = prefill_oracle(*inputs.args, **case.options)
    assert got.dtype == inputs.q.dtype
    assert relative_error(got, expected) < TOLERANCE[case.dtype]
    assert not got[NUM_TOKENS - padding :].any()


def test_one_query_a_sequence_is_a_decode_step():
    case = AttentionCase("rows", (5, 200, 33), 4, 2, 32, dtype="float32", q_lens=(1, 1, 1))
    inputs = attention_inputs(case)
    prefill = jitted(case)(*inputs.args)
    decode = paged_decode(
        *(jnp.asarray(a) for a in (*inputs.args[:4], inputs.context_lens)), **case.options, backend="xla"
    )
    np.testing.assert_allclose(prefill, decode, rtol=1e-5, atol=1e-6)


def test_a_prompt_in_chunks_gives_what_it_gives_whole():
    case = AttentionCase("whole", (75,), 4, 2, 32, dtype="float32", q_lens=(75,))
    inputs = attention_inputs(case)
    whole = jitted(case)(*inputs.args)
    q, k_cache, v_cache, tables, _, _ = inputs.args
    chunks = []
    for begin, end in ((0, 17), (17, 34), (34, 75)):
        ends = np.array([0, end - begin], np.int32), np.array([end], np.int32)
        chunks.append(jitted(case)(q[begin:end], k_cache, v_cache, tables, *ends))
    np.testing.assert_allclose(np.concatenate(chunks), whole, rtol=1e-5, atol=1e-6)


def test_memory_follows_a_tile_and_not_the_width_of_the_block_table():
    cache = jax.ShapeDtypeStruct((256, 2, 16, 64), jnp.float32)
    arguments = (
        jax.ShapeDtypeStruct((1024, 4, 64), jnp.float32),
        cache,
        cache,
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, 4096), (9,), (8,))),
    )
    compiled = jax.jit(lambda *args: ragged_prefill(*args, scale=1.0, backend="xla")).lower(*arguments).compile()
    one_context = 4096 * 16 * 2 * 64 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < one_context // 4


def test_wrong_arguments_are_refused_with_what_was_got_and_what_is_allowed():
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        q, cache, tables = jnp.ones((5, 4, 16)), jnp.zeros((4, 2, 8, 16)), jnp.zeros((2, 3), jnp.int32)

        def call(q=q, tables=tables, cu=(0, 2, 5), lens=(2, 3), **options):
            lengths = jnp.array(cu, jnp.int32), jnp.array(lens, jnp.int32)
            return ragged_prefill(q, cache, cache, tables, *lengths, scale=1.0, backend="xla", **options)

        for wrong, words in (
            ({"q": jnp.ones((5, 3, 16))}, "q has 3 query heads"),
            ({"tables": tables[0]}, r"block_tables has shape \(3,\); it must be \[S, P\]"),
            ({"cu": (0, 5)}, r"cu_q_lens has shape \(2,\); it must be \[S \+ 1\] = \(3,\)"),
            ({"lens": (2, 3, 4)}, r"context_lens has shape \(3,\); it must be \[S\] = \(2,\)"),
            ({"sliding_window": -1}, "sliding_window is -1"),
        ):
            with pytest.raises(ValueError, match=words):
                call(**wrong)
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
