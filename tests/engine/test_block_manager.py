from hashlib import sha256

import pytest

from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.request import Request
from nanovllm_jax.sampling_params import SamplingParams

BLOCK = 4


def make_request(token_ids, salt=None, **kwargs):
    return Request("r", list(token_ids), SamplingParams(), cache_salt=salt, **kwargs)


def compute(manager, request):
    """Admits the request, as the scheduler does, and schedules its whole prompt. Returns its hits."""
    hits = manager.match_prefix(request)
    manager.allocate(request, hits, request.num_tokens)
    request.num_computed_tokens = request.num_tokens
    manager.register_full_blocks(request)
    return hits


@pytest.fixture
def manager():
    return BlockManager(num_blocks=8, block_size=BLOCK)


def test_full_blocks_of_an_equal_prefix_are_shared(manager):
    first, second = make_request(range(10)), make_request([*range(8), 99, 98])
    assert compute(manager, first) == []
    assert compute(manager, second) == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    assert manager.num_free_blocks == 8 - 4
    manager.check_integrity([first, second])


def test_an_equal_block_after_another_prefix_is_not_shared(manager):
    compute(manager, make_request([1, 2, 3, 4, 5, 6, 7, 8]))
    assert manager.match_prefix(make_request([0, 2, 3, 4, 5, 6, 7, 8, 9])) == []


def test_when_the_whole_prompt_hits_the_last_block_is_computed_again(manager):
    first, second = make_request(range(8)), make_request(range(8))
    compute(manager, first)
    assert compute(manager, second) == first.block_ids[:1]
    assert second.block_ids[1] != first.block_ids[1]


def test_of_two_equal_blocks_the_first_serves(manager):
    first, second = make_request(range(8)), make_request(range(8))
    compute(manager, first)
    compute(manager, second)
    assert manager.match_prefix(make_request(range(9))) == first.block_ids


@pytest.mark.parametrize("other", ["b", "", None])
def test_a_salt_shares_only_with_itself(manager, other):
    first = make_request(range(9), salt="a")
    compute(manager, first)
    assert manager.match_prefix(make_request(range(9), salt=other)) == []
    assert manager.match_prefix(make_request(range(9), salt="a")) == first.block_ids[:2]


def test_hashes_are_sha256_of_all_tokens_to_each_blocks_end(manager):
    request = make_request(range(9))
    compute(manager, request)
    known = b"".join(i.to_bytes(4, "little") for i in range(8))
    assert request.block_hashes == [sha256(known[:16]).digest(), sha256(known).digest()]


def test_tokens_that_come_later_are_hashed_as_those_of_the_prompt(manager):
    grown, whole = make_request(range(5)), make_request(range(8))
    compute(manager, grown)
    grown.token_ids.extend(range(5, 8))
    grown.num_computed_tokens = 8
    manager.register_full_blocks(grown)
    compute(manager, whole)
    assert grown.block_hashes == whole.block_hashes


def test_freed_blocks_still_hit_until_they_are_taken(manager):
    first, second = make_request(range(8)), make_request(range(9))
    compute(manager, first)
    blocks = first.block_ids
    manager.free(first)
    assert manager.num_free_blocks == 8
    assert compute(manager, second) == blocks
    assert manager.num_free_blocks == 8 - 3
    manager.check_integrity([second])


def test_least_recently_freed_blocks_are_taken_first_and_tails_before_heads(manager):
    requests = [make_request(range(start, start + 12)) for start in (0, 100)]
    for request in requests:
        compute(manager, request)
    tables = [request.block_ids for request in requests]
    for request in requests:
        manager.free(request)
    newcomer = make_request([7] * 32)
    compute(manager, newcomer)
    never_used = sorted(set(range(8)) - set(tables[0]) - set(tables[1]))
    assert newcomer.block_ids == never_used + tables[0][::-1] + tables[1][::-1]


def test_a_hit_leaves_the_middle_of_the_free_blocks(manager):
    first, second = make_request(range(8)), make_request(range(100, 108))
    for request in (first, second):
        compute(manager, request)
    first_table = first.block_ids
    manager.free(first)
    manager.free(second)
    again = make_request(range(9))
    assert compute(manager, again) == first_table
    taker = make_request([5] * 20)
    compute(manager, taker)
    assert not set(taker.block_ids) & set(again.block_ids)
    manager.check_integrity([again, taker])


def test_a_taken_block_forgets_its_prefix(manager):
    first = make_request(range(32))
    compute(manager, first)
    head = first.block_ids[:7]
    manager.free(first)
    manager.allocate(make_request([1] * 4), [], 4)
    assert manager.match_prefix(make_request(range(33))) == head


def test_hits_that_nobody_holds_count_as_needed_blocks(manager):
    first = make_request(range(8))
    compute(manager, first)
    hits = manager.match_prefix(make_request(range(9)))
    assert manager.can_allocate(hits, (6 + 2) * BLOCK)
    assert not manager.can_allocate(hits, (6 + 2) * BLOCK, reserve=1)
    manager.free(first)
    assert manager.can_allocate(hits, 8 * BLOCK)
    assert not manager.can_allocate(hits, 8 * BLOCK + 1)


def test_only_blocks_whose_tokens_are_known_and_computed_are_registered(manager):
    request = make_request(range(6))
    compute(manager, request)
    request.token_ids.extend([6, 7])  # read back, the last one not computed yet
    request.num_computed_tokens = 7
    manager.register_full_blocks(request)
    assert len(manager.match_prefix(make_request(range(9)))) == 1
    request.num_computed_tokens = 8
    manager.register_full_blocks(request)
    assert len(manager.match_prefix(make_request(range(9)))) == 2


def test_unregistered_blocks_no_longer_hit(manager):
    first = make_request(range(12))
    compute(manager, first)
    manager.unregister_blocks(first.block_ids[1:])
    assert manager.match_prefix(make_request(range(13))) == first.block_ids[:1]
    manager.check_integrity([first])


def test_a_request_may_skip_the_cache_and_still_fill_it(manager):
    first = make_request(range(8), skip_prefix_cache_read=True)
    compute(manager, first)
    assert manager.match_prefix(make_request(range(9), skip_prefix_cache_read=True)) == []
    assert manager.match_prefix(make_request(range(9))) == first.block_ids


def test_nothing_is_hashed_or_shared_without_prefix_caching():
    manager = BlockManager(num_blocks=8, block_size=BLOCK, enable_prefix_caching=False)
    first = make_request(range(8))
    compute(manager, first)
    assert manager.match_prefix(make_request(range(9))) == []
    assert first.block_hashes == []


def test_reset_is_refused_while_a_block_is_held(manager):
    first = make_request(range(8))
    compute(manager, first)
    assert not manager.reset_prefix_cache()
    manager.free(first)
    assert manager.reset_prefix_cache()
    assert manager.match_prefix(make_request(range(9))) == []
    manager.check_integrity([])


def test_check_integrity_finds_a_block_that_was_not_freed(manager):
    compute(manager, make_request(range(8)))
    with pytest.raises(RuntimeError, match="Reference counts"):
        manager.check_integrity([])


def test_check_integrity_finds_a_hash_that_is_not_the_tokens(manager):
    request = make_request(range(8))
    compute(manager, request)
    request.block_ids.reverse()
    with pytest.raises(RuntimeError, match="another prefix"):
        manager.check_integrity([request])
