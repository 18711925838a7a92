import random
from functools import partial

import pytest
import schedulers

from nanovllm_jax.engine.engine import PreparedRequest
from nanovllm_jax.engine.request import Request
from nanovllm_jax.engine.step_filling import HeldBack, StepFilling
from nanovllm_jax.sampling_params import SamplingParams

make_scheduler = partial(schedulers.make_scheduler, max_num_seqs=8, num_blocks=128)


def first_step(scheduler, prompts, *, early, **kwargs):
    """Its (request id, start, tokens), and how many requests were queued when it started."""
    filling, queued = StepFilling(scheduler), 0
    for index, prompt in enumerate(prompts):
        request = Request(str(index), prompt, SamplingParams(), **kwargs)
        scheduler.add(request)
        filling.add(request)
        queued += 1
        if early and filling.is_full:
            break
    schedule = scheduler.schedule()
    return [(s.request.request_id, s.start, s.num_tokens) for s in schedule.sequences], queued


def draw_prompts(seed, lengths=(1, 30)):
    """Forty prompts, half of which begin with the same 13 tokens."""
    draw = random.Random(seed)
    prefix = [draw.randrange(1000) for _ in range(13)]
    return [prefix * draw.randrange(2) + [draw.randrange(1000)] * draw.randint(*lengths) for _ in range(40)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "changes", [{}, {"enable_prefix_caching": False}, {"max_num_seqs": 3}, {"num_blocks": 12, "max_num_seqs": 6}]
)
@pytest.mark.parametrize("skip", [False, True])
def test_a_step_that_starts_when_it_is_full_is_that_of_the_whole_queue(seed, changes, skip):
    prompts = draw_prompts(seed)
    early, _ = first_step(make_scheduler(**changes), prompts, early=True, skip_prefix_cache_read=skip)
    whole, _ = first_step(make_scheduler(**changes), prompts, early=False, skip_prefix_cache_read=skip)
    assert early == whole


@pytest.mark.parametrize(
    ("prompt_len", "changes", "queued"),
    [(16, {}, 4), (2, {}, 8), (16, {"scheduling_policy": "priority"}, 40)],
    ids=["tokens", "rows", "priority"],
)
def test_a_step_is_full_without_tokens_or_rows_left_and_never_by_priority(prompt_len, changes, queued):
    prompts = [[index] * prompt_len for index in range(40)]
    assert first_step(make_scheduler(**changes), prompts, early=True)[1] == queued


def test_what_an_earlier_step_or_the_same_one_computes_takes_no_room():
    scheduler = make_scheduler(max_num_seqs=16)
    prompts = [[*range(16), 100 + index] for index in range(40)]
    assert first_step(scheduler, prompts[:1], early=True)[1] == 1
    assert first_step(make_scheduler(max_num_seqs=16), prompts, early=True)[1] == 16
    filling = StepFilling(scheduler)
    filling.add(Request("cached", [*range(16), 99], SamplingParams()))
    filling.add(Request("other", [7] * 62, SamplingParams()))
    assert not filling.is_full
    filling.add(Request("last", [8], SamplingParams()))
    assert filling.is_full


def held_until_due(prompt_len, running=2):
    """How many requests are held until they are queued, beside some that run, with 8 rows and steps of 64 tokens."""
    scheduler = make_scheduler(decode_steps=1)
    for index in range(running):
        scheduler.add(Request(f"running-{index}", [index] * 4, SamplingParams(max_tokens=8)))
    scheduler.schedule()
    held = HeldBack([scheduler])
    for index in range(40):
        requests = [Request(str(index), [index] * prompt_len, SamplingParams())]
        held.add(PreparedRequest(str(index), requests, None, False, 0.0))
        if held.is_due:
            break
    taken = held.take()
    assert [prepared.request_id for prepared in taken] == [str(index) for index in range(len(taken))]
    assert held.take() == []
    return len(taken)


def test_prompts_are_held_back_until_they_fill_the_free_rows_or_a_step():
    assert held_until_due(prompt_len=2) == 6
    assert held_until_due(prompt_len=20) == 4


def test_prompts_are_not_held_back_from_a_replica_that_stands_idle_or_is_full():
    assert held_until_due(prompt_len=2, running=0) == 1
    assert held_until_due(prompt_len=2, running=8) == 1
