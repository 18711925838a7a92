import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from nanovllm_jax.step.logprobs import gather_logprobs

compiled = jax.jit(gather_logprobs, static_argnums=2)


def case(kind, vocab_size):
    generator = np.random.default_rng(vocab_size)
    logits = generator.normal(size=(6, vocab_size)).astype(np.float32) * 4
    if kind == "tied":
        logits = np.round(logits / 4) + np.float32(0)  # no -0, which sorts before 0
    if kind == "clustered":  # the largest lie side by side, in one group of ids
        logits[:, vocab_size // 2 : vocab_size // 2 + 40] += 50
    tokens = generator.integers(0, vocab_size, 6).astype(np.int32)
    tokens[0] = vocab_size - 1
    return logits, tokens


@pytest.mark.parametrize("kind", ["ordinary", "tied", "clustered"])
@pytest.mark.parametrize("vocab_size", [20, 5000, 49_152])
def test_follow_numpy(kind, vocab_size):
    logits, tokens = case(kind, vocab_size)
    logprobs, ranks, top_ids, top_logprobs = compiled(jnp.asarray(logits), jnp.asarray(tokens), 20)
    expected = log_softmax(logits.astype(np.float64), axis=1)
    rows = np.arange(6)
    np.testing.assert_allclose(logprobs, expected[rows, tokens], atol=2e-5)
    np.testing.assert_array_equal(ranks, (logits >= logits[rows, tokens][:, None]).sum(1))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(top_ids, order)
    np.testing.assert_allclose(top_logprobs, np.take_along_axis(expected, order, 1), atol=2e-5)


def test_the_likeliest_token_has_rank_1():
    logits, _ = case("ordinary", 300)
    _, ranks, top_ids, _ = compiled(jnp.asarray(logits), jnp.argmax(jnp.asarray(logits), axis=1), 1)
    assert ranks.tolist() == [1] * 6
    np.testing.assert_array_equal(top_ids[:, 0], logits.argmax(1))


def test_tokens_of_probability_0_have_minus_infinity():
    logits = jnp.asarray([[0.0, -jnp.inf, 1.0]])
    logprobs, ranks, *_ = compiled(logits, jnp.asarray([1], jnp.int32), 2)
    assert (logprobs[0], ranks[0]) == (-np.inf, 3)


@pytest.mark.parametrize("shards", [4])
@pytest.mark.parametrize("kind", ["ordinary", "tied"])
def test_shards_of_the_vocabulary_agree_with_the_whole(kind, shards):
    logits, tokens = case(kind, 4096)
    parts = jnp.asarray(logits).reshape(6, shards, -1).swapaxes(0, 1)
    sharded = jax.vmap(lambda part: gather_logprobs(part, jnp.asarray(tokens), 20, "model"), axis_name="model")
    results = jax.jit(sharded)(parts)
    whole = compiled(jnp.asarray(logits), jnp.asarray(tokens), 20)
    for split, expected in zip(results, whole, strict=True):
        for shard in range(shards):
            np.testing.assert_allclose(split[shard], expected, atol=1e-5)
