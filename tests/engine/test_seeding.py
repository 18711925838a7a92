import itertools

import numpy as np

from nanovllm_jax.engine.seeding import make_key


def test_key_is_two_32_bit_words_for_any_integer_seed():
    for seed, index in itertools.product((0, 1, -1, 2**31, 2**63, 2**64 - 1, -(2**63)), (0, 1, 1000)):
        assert all(0 <= word < 2**32 for word in make_key(seed, index))


def test_key_of_a_seed_never_changes():
    # A seed's text must survive upgrades: these values are part of the interface.
    assert make_key(0, 0) == (0xA706DD2F, 0x4D197E6F)
    assert make_key(42, 3) == (0x113E5DEC, 0x6F8FD8A8)


def test_keys_of_neighbouring_seeds_and_samples_are_distinct():
    keys = {make_key(seed, index) for seed in range(-200, 200) for index in range(100)}
    assert len(keys) == 400 * 100


def test_neighbours_differ_in_half_of_the_bits():
    def bits(seed, index):
        high, low = make_key(seed, index)
        return (high << 32) | low

    flips = [(bits(seed, 0) ^ bits(seed + 1, 0)).bit_count() for seed in range(1000)]
    flips += [(bits(7, index) ^ bits(7, index + 1)).bit_count() for index in range(1000)]
    assert abs(np.mean(flips) - 32) < 0.5
    assert min(flips) > 10
