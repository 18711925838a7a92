import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sample_oracle import kept

from nanovllm_kernels.sample.filters import filter_tokens

compiled = jax.jit(filter_tokens)


WIDTH = 130


def keep(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What the filters keep of one row; shorter rows are filled with -inf, so that they share a compilation."""
    padded = np.full((1, max(len(logits), WIDTH)), -np.inf, np.float32)
    padded[0, : len(logits)] = logits
    values = [np.array([value], np.float32) for value in (1 / temperature, top_p, min_p)]
    dropped = compiled(padded, values[0], np.array([top_k], np.int32), *values[1:])
    return ~np.asarray(dropped)[0, : len(logits)] & np.isfinite(logits)


# XLA takes subnormal numbers for 0, and so for equals of it.
ordinary = st.floats(-30, 30, width=32, allow_subnormal=False)
tied = st.integers(-3, 3).map(float)
largest = float(np.finfo(np.float32).max)
extreme = st.floats(-largest, largest, width=32, allow_subnormal=False)
with_bans = st.one_of(ordinary, st.just(-np.inf))


def rows_of(*kinds):
    """Logits of 1 to 130 ids with at least one finite."""
    return (
        st.sampled_from(kinds)
        .flatmap(lambda elements: hnp.arrays(np.float32, st.sampled_from([1, 7, WIDTH]), elements=elements))
        .filter(lambda row: np.isfinite(row).any())
    )


rows = rows_of(ordinary, tied, extreme, with_bans)
examples = settings(max_examples=100, deadline=None, derandomize=True)


@examples
@given(rows, st.integers(0, 140))
def test_top_k_keeps_exactly_the_k_largest_and_their_equals(logits, top_k):
    np.testing.assert_array_equal(keep(logits, top_k=top_k), kept(logits, top_k=top_k))


@examples
@given(
    rows_of(ordinary, tied, with_bans),
    st.integers(0, 140),
    st.floats(1e-30, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.1, 5.0),
)
def test_all_filters_keep_what_sorting_keeps_up_to_the_rounding_of_masses(logits, top_k, top_p, min_p, temperature):
    result = keep(logits, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    less, more = 1 - 1e-4, 1 + 1e-4
    # A larger min_p leaves less for top_p to take a share of, so both ends vary on their own.
    ends = [
        kept(logits, top_k=top_k, top_p=min(top_p * a, 1.0), min_p=min(min_p * b, 1.0), temperature=temperature)
        for a in (less, more)
        for b in (less, more)
    ]
    assert (np.all(ends, axis=0) <= result).all()
    assert (result <= np.any(ends, axis=0)).all()


@examples
@given(rows, st.integers(0, 140), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_kept_tokens_are_the_largest_and_at_least_one(logits, top_k, top_p, min_p):
    result = keep(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    assert result.any()
    dropped = logits[~result]
    assert dropped.size == 0 or dropped.max() < logits[result].min()


@examples
@given(rows)
def test_neutral_values_keep_every_token(logits):
    np.testing.assert_array_equal(keep(logits), np.isfinite(logits))
    np.testing.assert_array_equal(keep(logits, top_k=10_000), np.isfinite(logits))


# 8 tokens of 1/2, 1/4, ... of the mass: shares that float32 holds exactly.
HALVES = np.log(0.5) * np.arange(1, 9)


@pytest.mark.parametrize(("top_p", "count"), [(0.4, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.99, 7), (1.0, 8)])
def test_top_p_keeps_the_token_that_reaches_p(top_p, count):
    assert keep(HALVES, top_p=top_p).sum() == count


def test_top_p_is_a_share_of_what_top_k_left():
    # Of the three largest, 4/7, 2/7, 1/7, the first two have 6/7 = 0.857.
    assert keep(HALVES, top_k=3, top_p=0.85).sum() == 2
    assert keep(HALVES, top_k=3, top_p=0.87).sum() == 3


def test_top_p_is_a_share_of_what_min_p_left():
    # 1/4 of the largest keeps three.
    assert keep(HALVES, min_p=0.249, top_p=0.85).sum() == 2


def test_min_p_is_relative_to_the_largest_probability():
    assert keep(HALVES, min_p=0.251).sum() == 2
    assert keep(HALVES, min_p=1.0).sum() == 1
    assert keep(HALVES, min_p=0.251, temperature=2.0).sum() == 4


@pytest.mark.parametrize("top_p", [0.0, 1e-45, 1e-38, 1e-9])
def test_tiny_top_p_keeps_the_largest(top_p):
    assert keep(HALVES, top_p=top_p).tolist() == [True] + [False] * 7


def test_equal_tokens_are_kept_together():
    logits = [1.0, 2.0, 1.0, 0.0, 1.0]
    assert keep(logits, top_k=2).tolist() == [True, True, True, False, True]
    assert keep([0.0, -0.0, 0.0, -1.0], top_k=1).tolist() == [True, True, True, False]
    assert keep([0.0] * 100, top_p=0.01).all()


def test_a_large_vocabulary_is_cut_exactly():
    logits = np.random.default_rng(0).normal(size=151_936).astype(np.float32) * 3
    for top_k in (1, 50, 1000, 151_935):
        assert keep(logits, top_k=top_k).sum() == kept(logits, top_k=top_k).sum() >= top_k
    for top_p in (0.1, 0.9, 0.999):
        count = keep(logits, top_p=top_p).sum()
        assert kept(logits, top_p=top_p - 1e-6).sum() <= count <= kept(logits, top_p=top_p + 1e-6).sum()
