import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_oracle import changed_logits, make_params, make_state, probabilities
from scipy import stats

from nanovllm_jax.step.sampler import FullState, SamplerParams, sample_filtered, sample_full, sample_plain

plain, filtered = jax.jit(sample_plain), jax.jit(sample_filtered)
full = jax.jit(sample_full, static_argnames="num_logprobs")


def random_logits(batch, vocab_size, seed=0, scale=2.0):
    return (np.random.default_rng(seed).normal(size=(batch, vocab_size)) * scale).astype(np.float32)


def draws(variant, params, logits, state=None):
    """Tokens of one of the three variants; state is made when it is not given."""
    if variant == "plain":
        return np.asarray(plain(logits, params))
    if variant == "filtered":
        return np.asarray(filtered(logits, params))
    return np.asarray(full(logits, params, state or make_state(*logits.shape), num_logprobs=3).tokens)


# --- frequencies

DRAWS, VOCAB = 10_000, 40

FILTERS = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 3": {"temperature": 3.0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "top_k and top_p": {"top_k": 12, "top_p": 0.7, "temperature": 1.5},
    "min_p and top_k": {"min_p": 0.02, "top_k": 20, "temperature": 2.0},
    "all filters": {"min_p": 0.05, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
}
ROW = {"prompt": [0, 1, 2, 3], "output": [3, 3, 4, 5], "adjust": [(6, 2.0, 1 << 30), (7, -np.inf, 5)]}
PENALTIES = {
    "repetition": {"repetition": 1.5},
    "presence": {"presence": 1.2},
    "frequency": {"frequency": 0.9},
    "all penalties": {"repetition": 0.8, "presence": -0.5, "frequency": 0.4},
}


def assert_frequencies(tokens, expected):
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    assert (expected > 0).sum() >= 4
    often = expected * DRAWS >= 5
    observed, wanted = counts[often].astype(float), expected[often] * DRAWS
    if not often.all():  # pool what is too rare for the test
        rare = expected[~often].sum() * DRAWS
        observed, wanted = np.append(observed, counts[~often].sum()), np.append(wanted, rare)
        if rare < 1:
            observed[-2], wanted[-2] = observed[-2:].sum(), wanted[-2:].sum()
            observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.mark.parametrize("varying", ["position", "seed"])
@pytest.mark.parametrize("name", FILTERS)
def test_frequencies_follow_the_filtered_distribution(name, varying):
    logits = random_logits(1, VOCAB, seed=3, scale=1.0)
    identity = {"position": np.arange(DRAWS)} if varying == "position" else {"seeds": np.arange(DRAWS)}
    params = make_params(DRAWS, **FILTERS[name], **identity)
    variant = "plain" if name.startswith("temperature") else "filtered"
    tokens = draws(variant, params, np.broadcast_to(logits, (DRAWS, VOCAB)))
    assert_frequencies(tokens, probabilities(logits[0], **FILTERS[name]))


@pytest.mark.parametrize("name", PENALTIES)
def test_frequencies_follow_penalties_biases_and_bans(name):
    logits = random_logits(1, VOCAB, seed=4, scale=1.0)
    params = make_params(DRAWS, seeds=9, position=np.arange(DRAWS), top_k=30, **PENALTIES[name])
    one = make_state(1, VOCAB, prompts=[ROW["prompt"]], outputs=[ROW["output"]], adjust=[ROW["adjust"]])
    state = FullState(one.counts, *(np.broadcast_to(part, (DRAWS, *part.shape[1:])) for part in one[1:]))
    tokens = draws("full", params, np.broadcast_to(logits, (DRAWS, VOCAB)), state)
    changed = changed_logits(logits[0], **ROW, **PENALTIES[name])
    assert_frequencies(tokens, probabilities(changed, top_k=30))


# --- greedy


@pytest.mark.parametrize("variant", ["plain", "filtered", "full"])
@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_temperature_0_takes_the_largest_and_the_first_of_equals(variant, temperature):
    logits = random_logits(16, 300)
    logits[0], logits[1, [7, 200]] = 1.0, 99.0
    tokens = draws(variant, make_params(16, seeds=np.arange(16), temperature=temperature), logits)
    assert tokens.tolist() == logits.argmax(1).tolist()
    assert tokens[:2].tolist() == [0, 7]


def test_greedy_takes_the_largest_after_penalties_and_bans():
    logits = np.array([[3.0, 2.9, 2.8, 1.0]] * 4, np.float32)
    state = make_state(
        4,
        4,
        prompts=[[], [0], [], []],
        outputs=[[0], [1], [], []],
        adjust=[[], [], [(0, -np.inf, 2)], [(3, 2.5, 9)]],
    )
    params = make_params(
        4, temperature=0.0, presence=[0.15, 0, 0, 0], repetition=[1, 1.2, 1, 1], num_output=[1, 1, 0, 0]
    )
    assert draws("full", params, logits, state).tolist() == [1, 2, 1, 3]


def test_min_tokens_ban_ends_at_its_output_token():
    logits = np.array([[5.0, 1.0, 0.0]] * 3, np.float32)
    state = make_state(3, 3, adjust=[[(0, -np.inf, 2)]] * 3)
    params = make_params(3, temperature=0.0, num_output=[0, 1, 2])
    assert draws("full", params, logits, state).tolist() == [1, 1, 0]


# --- what a draw depends on

MIXED = {
    "temperature": [0.0, 0.7, 1.0, 2.0, 1.0, 0.9],
    "top_k": [0, 0, 5, 50, 0, 20],
    "top_p": [1.0, 1.0, 1.0, 0.9, 0.5, 0.95],
    "min_p": [0.0, 0.0, 0.0, 0.01, 0.1, 0.0],
    "position": [3, 4, 5, 6, 7, 8],
    "seeds": [1, 1, 2, 3, 4, 5],
    "repetition": [1.0, 1.2, 1.0, 0.9, 1.0, 1.0],
    "presence": [0.0, 0.5, 0.0, 0.0, 1.0, 0.0],
    "frequency": [0.1, 0.0, 0.0, 0.2, 0.0, 0.0],
}
LISTS = [[1, 2], [3], [], [4, 4, 5], [6], []]


def mixed_batch(vocab_size=512):
    state = make_state(6, vocab_size, prompts=LISTS, outputs=LISTS[::-1], adjust=[[(9, 1.0, 5)]] * 6)
    return random_logits(6, vocab_size, seed=1), make_params(6, **MIXED), state


def rows_of(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@pytest.mark.parametrize("variant", ["plain", "filtered", "full"])
def test_a_row_draws_the_same_in_any_batch(variant):
    logits, params, state = mixed_batch()
    expected = draws(variant, params, logits, state)
    for index in (
        [2],
        [5, 4, 3, 2, 1, 0],
        [0, 3],
        [1] * 11,
        [4, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 0, 0, 0, 0, 0],
    ):
        index = np.array(index)
        part = FullState(state.counts, *rows_of(state[1:], index))
        tokens = draws(variant, rows_of(params, index), logits[index], part)
        assert tokens.tolist() == expected[index].tolist()


def test_a_row_draws_the_same_from_every_variant_that_serves_it():
    logits = random_logits(64, 512, seed=2)
    params = make_params(64, seeds=np.arange(64), temperature=np.linspace(0, 2, 64))
    tokens = draws("plain", params, logits)
    assert draws("filtered", params, logits).tolist() == tokens.tolist()
    assert draws("full", params, logits).tolist() == tokens.tolist()


@pytest.mark.parametrize("variant", ["plain", "filtered", "full"])
def test_other_rows_do_not_matter(variant):
    logits, params, state = mixed_batch()
    expected = draws(variant, params, logits, state)
    logits[::2] = np.nan
    assert draws(variant, params, logits, state)[1::2].tolist() == expected[1::2].tolist()


@pytest.mark.parametrize("shards", [2, 8])
def test_shards_of_the_vocabulary_draw_what_the_whole_draws(shards):
    logits, params, state = mixed_batch()

    def every_variant(part, counts, params, state):
        return (
            sample_plain(part, params, axis_name="model"),
            sample_filtered(part, params, axis_name="model"),
            sample_full(part, params, state._replace(counts=counts), num_logprobs=3, axis_name="model"),
        )

    def split(array):
        return np.moveaxis(array.reshape(array.shape[0], shards, -1), 1, 0)

    sharded = jax.jit(jax.vmap(every_variant, in_axes=(0, 0, None, None), axis_name="model"))
    tokens, filtered_tokens, sampled = sharded(split(logits), split(state.counts), params, state)
    assert (np.asarray(tokens) == draws("plain", params, logits)).all()
    assert (np.asarray(filtered_tokens) == draws("filtered", params, logits)).all()
    for parts, whole in zip(sampled, full(logits, params, state, num_logprobs=3), strict=True):
        for part in np.asarray(parts):
            np.testing.assert_allclose(part, whole, atol=1e-5)


def test_key_and_position_each_change_the_draw():
    logits = np.zeros((8, 5000), np.float32)
    base = draws("plain", make_params(8, seeds=1, position=np.arange(8)), logits)
    assert len(set(base.tolist())) == 8
    assert draws("plain", make_params(8, seeds=2, position=np.arange(8)), logits).tolist() != base.tolist()


# --- errors

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("variant", ["plain", "filtered", "full"])
def test_rows_without_a_distribution_give_minus_1_and_others_go_on(variant, temperature):
    bad = [
        [NAN, 1.0, 2.0],
        [1.0, 2.0, NAN],
        [INF, 1.0, 2.0],
        [1.0, -INF, INF],
        [INF, INF, NAN],
        [-INF, -INF, -INF],
        [NAN, NAN, NAN],
        [-INF, NAN, -INF],
    ]
    good = [[-INF, 1.0, -INF], [-INF, -INF, -1e38]]
    params = make_params(10, temperature=temperature, top_k=2, top_p=0.9, min_p=0.01)
    tokens = draws(variant, params, np.array(bad + good, np.float32))
    assert tokens.tolist() == [-1] * 8 + [1, 2]


def test_a_row_with_every_token_banned_gives_minus_1():
    banned = [(token, -INF, 9) for token in range(3)]
    state = make_state(2, 3, adjust=[banned, banned[:2]])
    assert draws("full", make_params(2), np.zeros((2, 3), np.float32), state).tolist() == [-1, 2]


def test_a_ban_does_not_hide_a_bad_logit():
    state = make_state(2, 3, adjust=[[(0, -INF, 9)]] * 2)
    logits = np.array([[NAN, 0.0, 0.0], [INF, 0.0, 0.0]], np.float32)
    assert draws("full", make_params(2), logits, state).tolist() == [-1, -1]


def test_padding_rows_take_no_row_slot():
    logits, params, state = mixed_batch()
    padded = state._replace(rows=np.full(6, -1, np.int32))
    assert full(logits, params, padded, num_logprobs=3).tokens.shape == (6,)


# --- log-probabilities


def test_logprobs_are_of_the_untouched_logits():
    logits, params, state = mixed_batch()
    sampled = full(logits, params, state, num_logprobs=20)
    expected = np.asarray(jax.nn.log_softmax(logits, axis=1))
    tokens = np.asarray(sampled.tokens)
    np.testing.assert_allclose(sampled.logprobs, expected[np.arange(6), tokens], atol=1e-5)
    np.testing.assert_array_equal(sampled.ranks, (logits >= logits[np.arange(6), tokens][:, None]).sum(1))
    np.testing.assert_array_equal(sampled.top_ids, np.argsort(-logits, axis=1)[:, :20])
    np.testing.assert_allclose(sampled.top_logprobs, -np.sort(-expected, axis=1)[:, :20], atol=1e-5)


# --- lowering


def test_every_variant_lowers_for_gpus_without_a_sort_of_the_vocabulary():
    batch, vocab_size, table = 256, 151_936, 64
    shape = jax.ShapeDtypeStruct
    logits = shape((batch, vocab_size), jnp.float32)
    params = SamplerParams(*(shape(leaf.shape, leaf.dtype) for leaf in make_params(batch)))
    state = FullState(
        counts=shape((batch, vocab_size), jnp.uint16),
        rows=shape((batch,), jnp.int32),
        adjust_ids=shape((batch, table), jnp.int32),
        adjust_values=shape((batch, table), jnp.float32),
        adjust_until=shape((batch, table), jnp.int32),
    )
    for function, arguments in (
        (sample_plain, (logits, params)),
        (sample_filtered, (logits, params)),
        (sample_full, (logits, params, state)),
    ):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        sorts = [line for line in text.splitlines() if "top_k" in line or "stablehlo.sort" in line]
        assert not any("256x151936" in line for line in sorts)
