import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_oracle import changed_logits, make_params, make_state

from nanovllm_jax.step.penalties import (
    adjust_logits,
    count_prompt,
    count_sampled,
    penalise_logits,
)

ROWS, VOCAB, LENGTH = 3, 11, 24
compiled_prompt = jax.jit(count_prompt, donate_argnums=0)
compiled_sampled = jax.jit(count_sampled, donate_argnums=0)
compiled_adjust = jax.jit(adjust_logits)
compiled_penalise = jax.jit(penalise_logits)


def empty_counts(num_rows, vocab_size):
    return jnp.zeros((num_rows, vocab_size), jnp.uint16)


def ints(*values):
    return jnp.asarray(values, jnp.int32)


def decoded(counts):
    """(in prompt, times generated) as NumPy."""
    counts = np.asarray(counts)
    return counts & 1, counts >> 1


def call_prompt(counts, entries, reset=(-1, -1), length=LENGTH):
    """One call with (row, token, is output) entries, padded."""
    entries = [*entries, *[(-1, 0, False)] * (length - len(entries))]
    rows, tokens, outputs = zip(*entries, strict=True)
    return compiled_prompt(counts, ints(*reset), ints(*rows), ints(*tokens), jnp.asarray(outputs))


entry = st.tuples(st.integers(-1, ROWS - 1), st.integers(0, VOCAB - 1), st.booleans())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(entry, max_size=LENGTH), max_size=3))
def test_counts_follow_numpy_over_several_calls(calls):
    counts, in_prompt, outputs = empty_counts(ROWS, VOCAB), np.zeros((ROWS, VOCAB)), np.zeros((ROWS, VOCAB))
    for entries in calls:
        counts = call_prompt(counts, entries)
        for row, token, is_output in entries:
            if row >= 0 and is_output:
                outputs[row, token] += 1
            elif row >= 0:
                in_prompt[row, token] = 1
    np.testing.assert_array_equal(decoded(counts), (in_prompt, outputs))


def test_reset_clears_only_the_named_rows():
    counts = call_prompt(empty_counts(ROWS, VOCAB), [(row, 5, True) for row in range(ROWS)])
    counts = call_prompt(counts, [(1, 2, False)], reset=(1, -1))
    in_prompt, outputs = decoded(counts)
    assert outputs[:, 5].tolist() == [1, 0, 1]
    assert in_prompt[:, 2].tolist() == [0, 1, 0]


def test_sampled_tokens_are_counted_and_padding_is_not():
    counts = call_prompt(empty_counts(ROWS, VOCAB), [(0, 5, False)])
    for _ in range(2):
        counts = compiled_sampled(counts, ints(0, -1, 2, 1), ints(5, 4, 10, -1))
    in_prompt, outputs = decoded(counts)
    assert (in_prompt.sum(), in_prompt[0, 5]) == (1, 1)
    assert (outputs.sum(), outputs[0, 5], outputs[2, 10]) == (4, 2, 2)


def test_recounting_after_preemption_equals_counting_as_sampled():
    counts = call_prompt(empty_counts(ROWS, VOCAB), [(1, 3, False), (1, 4, False)])
    for token in (4, 4, 9):
        counts = compiled_sampled(counts, ints(1), ints(token))
    again = call_prompt(
        empty_counts(ROWS, VOCAB), [(1, 3, False), (1, 4, False), (1, 4, True), (1, 4, True), (1, 9, True)]
    )
    np.testing.assert_array_equal(counts, again)


def test_counts_stop_at_the_largest_instead_of_wrapping():
    full = jnp.full((1, VOCAB), 2 * 32767 + 1, jnp.uint16)
    np.testing.assert_array_equal(compiled_sampled(full + 0, ints(0), ints(3)), full)
    np.testing.assert_array_equal(call_prompt(full + 0, [(0, 3, True)] * LENGTH), full)


def test_a_shard_counts_its_own_ids():
    whole = call_prompt(empty_counts(ROWS, 12), [(0, token, True) for token in range(12)])
    for offset in (0, 6):
        part = compiled_prompt(
            empty_counts(ROWS, 6), ints(-1), ints(*[0] * 12), ints(*range(12)), jnp.ones(12, bool), offset
        )
        np.testing.assert_array_equal(part, whole[:, offset : offset + 6])
        part = compiled_sampled(part, ints(0, 1), ints(offset, 11 - offset), offset)
        assert decoded(part)[1][0, 0] == 2
        assert decoded(part)[1][1].sum() == 0


@pytest.mark.parametrize("update", ["prompt", "sampled"])
def test_donated_counts_keep_their_buffer(update):
    counts = empty_counts(8, 1000)
    address = counts.unsafe_buffer_pointer()
    counts = call_prompt(counts, [(2, 7, True)]) if update == "prompt" else compiled_sampled(counts, ints(2), ints(7))
    assert counts.unsafe_buffer_pointer() == address


token_lists = st.lists(st.integers(0, VOCAB - 1), max_size=8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    token_lists,
    token_lists,
    st.floats(0.1, 2.0),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.integers(0, 2**32 - 1),
)
def test_penalties_follow_numpy(prompt, output, repetition, presence, frequency, seed):
    logits = np.random.default_rng(seed).normal(size=(1, VOCAB)).astype(np.float32)
    params = make_params(1, repetition=repetition, presence=presence, frequency=frequency)
    entries = [(0, token, False) for token in prompt] + [(0, token, True) for token in output]
    counts = call_prompt(empty_counts(1, VOCAB), entries)
    result = compiled_penalise(
        jnp.asarray(logits),
        counts,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )
    expected = changed_logits(
        logits[0], prompt=prompt, output=output, repetition=repetition, presence=presence, frequency=frequency
    )
    np.testing.assert_allclose(result[0], expected, rtol=1e-5, atol=1e-5)


def test_neutral_penalties_change_no_bit():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, VOCAB)), jnp.float32)
    counts = call_prompt(empty_counts(1, VOCAB), [(0, 1, False), (0, 2, True), (0, 2, True)])
    one, zero = jnp.ones(1), jnp.zeros(1)
    np.testing.assert_array_equal(compiled_penalise(logits, counts, one, zero, zero), logits)


def test_adjustments_end_when_enough_tokens_were_generated():
    state = make_state(2, VOCAB, adjust=[[(3, 1.5, 1 << 30), (4, -np.inf, 2)], [(4, -np.inf, 3), (4, 1.0, 9)]])
    result = compiled_adjust(
        jnp.zeros((2, VOCAB)), state.adjust_ids, state.adjust_values, state.adjust_until, ints(2, 2)
    )
    assert result[0].tolist() == [0, 0, 0, 1.5, *[0] * 7]
    assert result[1].tolist() == [0, 0, 0, 0, -np.inf, *[0] * 6]


def test_adjustments_of_other_shards_are_left_to_them():
    state = make_state(1, 12, adjust=[[(0, 1.0, 9), (5, 2.0, 9), (6, 3.0, 9), (11, 4.0, 9)]])
    parts = [
        compiled_adjust(jnp.zeros((1, 6)), state.adjust_ids, state.adjust_values, state.adjust_until, ints(0), offset)
        for offset in (0, 6)
    ]
    assert np.concatenate(parts, axis=1)[0].tolist() == [1, 0, 0, 0, 0, 2, 3, 0, 0, 0, 0, 4]
