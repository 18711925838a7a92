import ast
from pathlib import Path

import pytest
from schedulers import BLOCK, make_scheduler

import nanovllm_jax
from nanovllm_jax.engine.request import NO_ROW, Request, RequestStatus
from nanovllm_jax.errors import ConfigError, RequestError
from nanovllm_jax.sampling_params import SamplingParams


def add(scheduler, request_id, prompt, max_tokens=8, **kwargs):
    token_ids = prompt if isinstance(prompt, list) else [token_of(request_id)] * prompt
    request = Request(request_id, token_ids, SamplingParams(max_tokens=max_tokens), **kwargs)
    scheduler.add(request)
    return request


def token_of(request_id):
    """A token that makes the prompts of different requests differ."""
    return 1000 + sum(map(ord, request_id))


def read(scheduler, schedule, token=7):
    """What the engine does at readback."""
    for sequence in schedule.sequences:
        request = sequence.request
        if sequence.samples and not request.is_finished:
            scheduler.on_tokens(request, [token])
            if len(request.output_token_ids) >= request.max_tokens:
                scheduler.finish(request)


def step(scheduler):
    """One step, read at once. Returns [(request id, start, tokens)]."""
    schedule = scheduler.schedule()
    read(scheduler, schedule)
    scheduler.check_integrity()
    return chunks(schedule)


def chunks(schedule):
    return [(s.request.request_id, s.start, s.num_tokens) for s in schedule.sequences]


# Admission and its refusals


def test_a_prompt_needs_room_for_one_more_token():
    scheduler = make_scheduler(max_model_len=8)
    add(scheduler, "fits", 7)
    with pytest.raises(RequestError, match=r"8 tokens, but prompt and output together may have 8, so at most 7"):
        add(scheduler, "long", 8)


def test_a_prompt_larger_than_the_cache_is_refused_with_the_remedy():
    scheduler = make_scheduler(num_blocks=2, length_remedy="raise gpu_memory_utilization")
    add(scheduler, "fits", 7)
    with pytest.raises(RequestError, match=r"shorten the prompt or raise gpu_memory_utilization"):
        add(scheduler, "long", 8)


def test_an_empty_prompt_is_refused():
    with pytest.raises(RequestError, match="'a' is empty"):
        add(make_scheduler(), "a", [])


def test_a_request_id_in_use_is_refused_and_a_finished_one_is_free_again():
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    add(scheduler, "a", 3, sample_index=1)
    with pytest.raises(RequestError, match="'a' is in use"):
        add(scheduler, "a", 3)
    scheduler.abort("a")
    add(scheduler, "a", 3)


def test_a_refused_request_leaves_nothing_behind():
    scheduler = make_scheduler(max_model_len=8)
    with pytest.raises(RequestError):
        add(scheduler, "a", 9)
    assert not scheduler.has_unfinished
    add(scheduler, "a", 3)


@pytest.mark.parametrize(
    ("max_tokens", "limits", "resolved"),
    [(8, {}, 8), (None, {}, 54), (100, {}, 54), (None, {"num_blocks": 5}, 10)],
)
def test_max_tokens_ends_at_the_models_limit_and_at_the_cache(max_tokens, limits, resolved):
    assert add(make_scheduler(**limits), "a", 10, max_tokens).max_tokens == resolved


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks"])
def test_limits_are_positive(name):
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        make_scheduler(**{name: 0})


def test_the_budget_holds_a_token_for_each_row():
    with pytest.raises(ConfigError, match="max_num_batched_tokens is 3, less than max_num_seqs 4"):
        make_scheduler(max_num_batched_tokens=3)


# Filling the budget


def test_prompts_are_chunked_to_fill_the_budget_and_continue_first():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add(scheduler, "a", 6)
    add(scheduler, "b", 9)
    add(scheduler, "c", 4)
    assert step(scheduler) == [("a", 0, 6), ("b", 0, 4)]
    assert step(scheduler) == [("b", 4, 5), ("c", 0, 4)]


def test_only_the_last_chunk_of_a_prompt_samples():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    request = add(scheduler, "a", 10)
    samples = []
    for _ in range(3):
        schedule = scheduler.schedule()
        samples.append([s.samples for s in schedule.sequences])
        read(scheduler, schedule)
    assert samples == [[False], [False], [True]]
    assert request.output_token_ids == [7]


def test_prefill_first_computes_prompts_alone_while_any_fit():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, "a", 6)
    step(scheduler)
    add(scheduler, "b", 12)
    kinds = []
    for _ in range(3):
        schedule = scheduler.schedule()
        kinds.append((schedule.kind, schedule.is_decode, chunks(schedule)))
        read(scheduler, schedule)
    assert kinds == [
        ("prefill", False, [("b", 0, 8)]),
        ("prefill", False, [("b", 8, 4)]),
        ("decode", True, [("a", 6, 1), ("b", 12, 1)]),
    ]


def test_mixed_gives_prompts_what_the_decodes_leave_of_the_budget():
    scheduler = make_scheduler(max_num_batched_tokens=8, batching="mixed")
    add(scheduler, "a", 6)
    step(scheduler)
    add(scheduler, "b", 12)
    schedule = scheduler.schedule()
    assert schedule.kind == "mixed"
    assert [s.is_decode for s in schedule.sequences] == [True, False]
    assert schedule.num_tokens == 8
    assert chunks(schedule) == [("a", 6, 1), ("b", 0, 7)]


@pytest.mark.parametrize(("policy", "order"), [("fcfs", ["a", "b", "c", "d"]), ("priority", ["c", "b", "d", "a"])])
def test_waiting_requests_are_served_by_policy(policy, order):
    scheduler = make_scheduler(scheduling_policy=policy)
    for request_id, priority in (("a", 5), ("b", 0), ("c", -1), ("d", 0)):
        add(scheduler, request_id, 3, priority=priority)
    assert [request_id for request_id, _, _ in step(scheduler)] == order


def test_no_more_requests_run_than_there_are_rows():
    scheduler = make_scheduler(max_num_seqs=2)
    requests = [add(scheduler, str(i), 3) for i in range(3)]
    step(scheduler)
    assert [r.row for r in requests] == [0, 1, NO_ROW]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    scheduler.finish(requests[0])
    step(scheduler)
    assert [r.row for r in requests] == [NO_ROW, 1, 0]


def test_the_first_step_in_a_row_says_so():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    add(scheduler, "a", 6)
    admitted = []
    for _ in range(3):
        schedule = scheduler.schedule()
        admitted += [s.is_admitted for s in schedule.sequences]
        read(scheduler, schedule)
    assert admitted == [True, False, False]


def test_a_waiting_prompt_leaves_a_free_block_for_each_running_request():
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, "a", 7)
    step(scheduler)
    late = add(scheduler, "b", 8)  # 2 blocks are free, and all of them would be taken
    assert step(scheduler) == [("a", 7, 1)]
    assert late.status is RequestStatus.WAITING


# Prefix cache


def test_requests_of_one_step_share_their_prefix():
    scheduler = make_scheduler()
    prefix = list(range(8))
    first, second = add(scheduler, "a", [*prefix, 50]), add(scheduler, "b", [*prefix, 60])
    assert step(scheduler) == [("a", 0, 9), ("b", 8, 1)]
    assert second.block_ids[:2] == first.block_ids[:2]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    assert (scheduler.block_manager.num_queried_tokens, scheduler.block_manager.num_hit_tokens) == (18, 8)


def test_a_chunk_shares_only_what_it_computed():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    prompt = list(range(20))
    add(scheduler, "a", prompt)
    step(scheduler)
    scheduler.abort("a")
    assert add(scheduler, "b", prompt).num_cached_tokens == 0
    assert step(scheduler) == [("b", 8, 10)]


def test_one_token_is_computed_when_the_whole_prompt_hits():
    scheduler = make_scheduler()
    first, second = add(scheduler, "a", list(range(9))), add(scheduler, "b", list(range(8)))
    step(scheduler)
    assert second.num_cached_tokens == 4
    assert second.block_ids[1] != first.block_ids[1]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_generated_block_is_shared_once_its_tokens_were_read(depth):
    scheduler = make_scheduler()
    add(scheduler, "a", [1, 2, 3], max_tokens=20)
    in_flight, hits_before = [], []
    for _ in range(7):
        in_flight.append(scheduler.schedule())
        if len(in_flight) > depth:
            read(scheduler, in_flight.pop(0))
        probe = Request("probe", [1, 2, 3, 7, 7, 7, 7, 7, 7], SamplingParams())
        hits_before.append(len(scheduler.block_manager.match_prefix(probe)))
    # Position 3 is computed by the second step, position 7 by the sixth; their ids were read before.
    assert hits_before == [0, 1, 1, 1, 1, 2, 2]


def test_a_failed_steps_blocks_are_not_shared():
    scheduler = make_scheduler()
    prompt = list(range(12))
    request = add(scheduler, "a", prompt)
    schedule = scheduler.schedule()
    scheduler.on_step_failed(schedule)
    scheduler.finish(request)
    add(scheduler, "b", prompt)
    assert step(scheduler) == [("b", 0, 12)]


def test_a_failed_step_is_undone_after_its_request_ended():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3)
    prefill = scheduler.schedule()
    decode = scheduler.schedule()  # fills the first block
    read(scheduler, prefill)
    scheduler.finish(request)
    scheduler.on_step_failed(decode)
    assert scheduler.block_manager.match_prefix(Request("b", [*request.token_ids, 0], request.params)) == []


def test_prompt_logprobs_compute_every_prompt_token():
    scheduler = make_scheduler()
    add(scheduler, "a", list(range(9)))
    add(scheduler, "b", list(range(9)), skip_prefix_cache_read=True)
    assert step(scheduler) == [("a", 0, 9), ("b", 0, 9)]


def test_reset_prefix_cache_is_refused_while_a_request_runs():
    scheduler = make_scheduler()
    add(scheduler, "a", list(range(9)))
    step(scheduler)
    assert not scheduler.reset_prefix_cache()
    scheduler.abort("a")
    assert scheduler.reset_prefix_cache()
    add(scheduler, "b", list(range(9)))
    assert step(scheduler) == [("b", 0, 9)]


# Steps that are dispatched before the last one is read


def test_a_decode_is_scheduled_while_its_token_is_unread():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert chunks(second) == [("a", 3, 1)]
    assert (request.num_tokens, request.num_unread, request.num_computed_tokens) == (3, 2, 4)
    read(scheduler, first, token=8)
    read(scheduler, second, token=9)
    assert request.output_token_ids == [8, 9]
    assert request.num_unread == 0


def test_a_finish_by_length_is_foreseen():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3, max_tokens=2)
    schedules = [scheduler.schedule(), scheduler.schedule()]
    assert scheduler.schedule() is None
    for schedule in schedules:
        read(scheduler, schedule)
    assert request.is_finished
    assert not scheduler.has_unfinished


def test_a_finish_by_the_models_limit_is_foreseen():
    scheduler = make_scheduler(max_model_len=5)
    request = add(scheduler, "a", 3, max_tokens=None)
    schedules = [scheduler.schedule(), scheduler.schedule()]
    assert scheduler.schedule() is None
    for schedule in schedules:
        read(scheduler, schedule)
    assert request.num_tokens == 5


def test_a_request_can_finish_while_a_decode_of_it_is_in_flight():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3)
    first, stray = scheduler.schedule(), scheduler.schedule()
    scheduler.on_tokens(request, [1])
    scheduler.finish(request)
    read(scheduler, stray)
    assert request.output_token_ids == [1]
    assert scheduler.block_manager.num_free_blocks == 32
    assert first.sequences[0].request.row == NO_ROW


def test_nothing_to_do_is_none():
    assert make_scheduler().schedule() is None


# Preemption


def fill_cache(policy="fcfs", priorities=(0, 0)):
    """Two running requests that hold all blocks; "a" needs one more in the next step."""
    scheduler = make_scheduler(num_blocks=5, scheduling_policy=policy)
    first = add(scheduler, "a", 7, priority=priorities[0])
    second = add(scheduler, "b", 8, priority=priorities[1])
    step(scheduler)
    step(scheduler)
    assert scheduler.block_manager.num_free_blocks == 0
    return scheduler, [first, second]


@pytest.mark.parametrize(
    ("policy", "priorities", "victim"),
    [("fcfs", (0, 0), "b"), ("fcfs", (1, 0), "b"), ("priority", (1, 0), "a"), ("priority", (0, 0), "b")],
)
def test_the_least_important_running_request_is_preempted(policy, priorities, victim):
    scheduler, requests = fill_cache(policy, priorities)
    schedule = scheduler.schedule()
    survivor = next(r for r in requests if r.request_id != victim)
    assert [s.request for s in schedule.sequences if s.is_decode] == [survivor]
    assert [r.request_id for r in requests if r.status is RequestStatus.WAITING] == [victim]
    assert [r.num_preemptions for r in requests] == [int(r.request_id == victim) for r in requests]
    assert scheduler.num_preemptions == 1


def test_a_prompt_half_computed_gives_way_to_an_older_decode():
    scheduler = make_scheduler(num_blocks=6, max_num_seqs=2, max_num_batched_tokens=2, batching="mixed")
    first = add(scheduler, "a", 7, max_tokens=12)
    for _ in range(4):
        step(scheduler)
    second = add(scheduler, "b", 12)
    while scheduler.num_preemptions == 0:
        assert first.row is not None
        step(scheduler)
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert second.output_token_ids == []


def test_a_preempted_request_holds_nothing_and_computes_its_output_again():
    scheduler, (first, second) = fill_cache()
    output = list(second.output_token_ids)
    assert len(output) == 2
    read(scheduler, scheduler.schedule())
    assert (second.row, second.block_ids, second.num_computed_tokens) == (NO_ROW, [], 0)
    scheduler.finish(first)
    schedule = scheduler.schedule()
    (sequence,) = (s for s in schedule.sequences if s.request is second)
    assert sequence.is_admitted
    assert not sequence.is_decode
    assert sequence.start + sequence.num_tokens == 8 + len(output)
    assert sequence.samples


def test_a_preempted_request_leads_its_class_and_finds_its_blocks_again():
    scheduler = make_scheduler(num_blocks=6, max_num_seqs=2)
    first, second = add(scheduler, "a", 8, max_tokens=10), add(scheduler, "b", 7, max_tokens=10)
    late = add(scheduler, "c", 2)
    while second.num_preemptions == 0:
        step(scheduler)
    assert second.row == NO_ROW
    scheduler.finish(first)
    order = step(scheduler)
    assert [request_id for request_id, _, _ in order] == ["b", "c"]
    assert order[0][1] >= BLOCK, "its blocks were still cached"
    assert late.row != NO_ROW
    assert second.num_cached_tokens == 0, "only the first admission counts"


def test_a_preempted_request_waits_until_its_last_token_is_read():
    scheduler = make_scheduler(num_blocks=4)
    first, second = add(scheduler, "a", 7), add(scheduler, "b", 3)
    in_flight = [scheduler.schedule()]
    while second.num_preemptions == 0:
        in_flight.append(scheduler.schedule())
        if second.num_preemptions == 0:
            read(scheduler, in_flight.pop(0))
    scheduler.finish(first)
    assert second.num_unread == 1
    assert scheduler.schedule() is None
    for schedule in in_flight:
        read(scheduler, schedule)
    assert second.num_unread == 0
    (sequence,) = scheduler.schedule().sequences
    assert sequence.request is second
    assert sequence.start + sequence.num_tokens == second.num_tokens


def test_every_request_ends_when_the_cache_holds_hardly_one():
    scheduler = make_scheduler(num_blocks=3)
    requests = [add(scheduler, str(i), 5, max_tokens=7) for i in range(4)]
    for _ in range(200):
        if scheduler.has_unfinished:
            step(scheduler)
    assert [len(r.output_token_ids) for r in requests] == [7] * 4
    assert scheduler.block_manager.num_free_blocks == 3


# Ends


def test_abort_ends_all_samples_in_any_state():
    scheduler = make_scheduler(max_num_seqs=1, max_num_batched_tokens=4)
    samples = [add(scheduler, "a", 6, sample_index=i) for i in range(2)]
    scheduler.schedule()
    assert [r.status for r in samples] == [RequestStatus.RUNNING, RequestStatus.WAITING]
    assert scheduler.abort("a") == samples
    assert all(r.is_finished for r in samples)
    assert not scheduler.has_unfinished
    assert scheduler.schedule() is None
    assert scheduler.block_manager.num_free_blocks == 32


def test_aborting_an_unknown_request_changes_nothing():
    assert make_scheduler().abort("a") == []


def test_finishing_twice_changes_nothing():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3)
    step(scheduler)
    scheduler.finish(request)
    scheduler.finish(request)
    scheduler.check_integrity()


@pytest.mark.parametrize("batching", ["prefill_first", "mixed"])
def test_a_finished_requests_row_and_blocks_serve_the_next(batching):
    scheduler = make_scheduler(max_num_seqs=1, num_blocks=4, batching=batching)
    for name in "abc":
        add(scheduler, name, 9, max_tokens=3)
    for _ in range(50):
        if scheduler.has_unfinished:
            step(scheduler)
    assert not scheduler.has_unfinished


def test_the_host_shell_does_not_import_jax():
    package = Path(nanovllm_jax.__file__).parent
    files = [package / name for name in ("sampling_params.py", "outputs.py")]
    files += [package / "engine" / f"{name}.py" for name in ("request", "block_manager", "schedule", "scheduler")]
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert not imported & {"jax", "jaxlib", "jaxtyping", "flax", "numpy", "transformers"}
