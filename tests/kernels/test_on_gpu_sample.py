"""The sampling kernels on a real GPU: `pytest -m gpu tests/kernels`."""

import jax
import numpy as np
import pytest
from sample_oracle import assert_draws, kept
from scipy import stats
from test_sample_head import logits_of

from nanovllm_kernels import sample, sample_head
from nanovllm_kernels.sample.cases import BENCHMARKS as SAMPLE_CASES
from nanovllm_kernels.sample.cases import hard_inputs, sample_inputs
from nanovllm_kernels.sample_head.cases import ON_GPU, sample_head_inputs

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("case", ON_GPU, ids=lambda case: case.name)
def test_sample_head(case):
    hidden, head, *rest = sample_head_inputs(case)
    tokens = jax.jit(lambda *args: sample_head(*args, backend="triton"))(hidden, head, *rest)
    assert_draws(tokens, logits_of(hidden, head), *rest)


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
