import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from scipy import stats

from nanovllm_jax.engine.seeding import make_key
from nanovllm_kernels.sample.noise import gumbel_noise

noise = jax.jit(gumbel_noise)


def keys(seeds):
    return jnp.asarray([make_key(seed, 0) for seed in seeds], jnp.uint32)


def draw(seeds, positions, ids):
    """Noise [rows, ids], with one seed and position a row."""
    return np.asarray(noise(keys(seeds), jnp.asarray(positions, jnp.int32), jnp.asarray(ids, jnp.int32)))


def along(what):
    """65,536 values in order of one of the three things that the noise depends on."""
    count, few = 16384, range(4)
    if what == "ids":
        return draw(few, [9] * 4, range(count))
    if what == "positions":
        return draw([5] * count, range(count), few).T
    return draw(range(count), [9] * count, few).T


@pytest.fixture(scope="module", params=["ids", "positions", "seeds"])
def uniforms(request):
    """[4, 16384] values that should be independent and uniform in (0, 1)."""
    return np.exp(-np.exp(-along(request.param).astype(np.float64)))


def test_is_standard_gumbel(uniforms):
    counts = np.histogram(uniforms, bins=256, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-4
    for row in uniforms:
        assert stats.kstest(row, "uniform").pvalue > 1e-4


def test_neighbours_are_independent(uniforms):
    for lag in (1, 2, 3, 4, 8, 32, 64, 128, 256, 1024):
        left, right = uniforms[:, :-lag].ravel(), uniforms[:, lag:].ravel()
        assert abs(np.corrcoef(left, right)[0, 1]) < 4.5 / np.sqrt(left.size), lag
        pairs = np.histogram2d(left, right, bins=16, range=[(0, 1)] * 2)[0]
        assert stats.chisquare(pairs.ravel()).pvalue > 1e-5, lag


def test_large_values_are_as_frequent_as_they_should_be():
    values = draw(range(64), [1] * 64, range(151936))
    for level in (8.0, 10.0, 12.0, 14.0):
        expected = values.size * -np.expm1(-np.exp(-level))
        assert stats.poisson.cdf((values > level).sum(), expected) > 1e-4
        assert stats.poisson.sf((values > level).sum() - 1, expected) > 1e-4


def test_a_flat_vocabulary_has_one_winner():
    values = np.sort(draw(range(200), [0] * 200, range(151936)), axis=1)
    assert (values[:, -1] > values[:, -2]).all()


def test_no_row_repeats_another_even_shifted():
    values = draw([0, 0, 0, 1, 2], [0, 1, 2, 0, 0], range(65536))
    for first in range(5):
        for second in range(first):
            for lag in range(-16, 17):
                left = values[first, max(lag, 0) : 65536 + min(lag, 0)]
                right = values[second, max(-lag, 0) : 65536 - max(lag, 0)]
                assert (left == right).mean() < 1e-3


def test_depends_on_key_position_and_id_alone():
    whole = draw([3, 4, 5, 6], [10, 11, 12, 13], range(100))
    np.testing.assert_array_equal(draw([5], [12], range(100))[0], whole[2])
    np.testing.assert_array_equal(draw([6, 5], [13, 12], range(60, 100)), whole[[3, 2], 60:])


def test_follows_the_documented_construction():
    # Threefry-2x32 of (position, 0) under the key; then two rounds of the 32-bit finaliser. A seed's text depends
    # on it, so it must not change unnoticed.
    def finalise(value):
        value = ((value ^ (value >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        value = ((value ^ (value >> 15)) * 0xD35A2D97) & 0xFFFFFFFF
        return value ^ (value >> 15)

    word0, word1 = (int(word) for word in threefry_2x32(keys([11])[0], jnp.array([77, 0], jnp.uint32)))
    expected = []
    for token in range(50):
        bits = finalise((finalise((token + word0) & 0xFFFFFFFF) + word1) & 0xFFFFFFFF)
        expected.append(-np.log(-np.log1p(-(bits + 0.5) / 2**32)))
    np.testing.assert_allclose(draw([11], [77], range(50))[0], expected, rtol=1e-4, atol=1e-5)


def test_is_finite_for_every_extreme_of_its_inputs():
    key = jnp.array([[0, 0], [2**32 - 1, 2**32 - 1]], jnp.uint32)
    values = noise(key, jnp.array([0, 2**31 - 1], jnp.int32), jnp.arange(300_000, dtype=jnp.int32))
    assert np.isfinite(np.asarray(values)).all()
