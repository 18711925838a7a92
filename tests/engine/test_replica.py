"""Where requests go, that no replica waits for another, and what ends a wait for one."""

import signal
import time

import pytest

from nanovllm_jax.engine.engine import Engine
from nanovllm_jax.engine.replica import Replica, choose_replica
from nanovllm_jax.engine.request import Request
from nanovllm_jax.engine.schedule import SchedulerConfig
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.errors import DeviceError
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.step.result import StepResult

PREFIX = list(range(100, 132))


class Step:
    """Done when the test says so."""

    def __init__(self, schedule, runner):
        self.schedule, self.runner = schedule, runner

    @property
    def is_ready(self):
        return self.runner.done


class StandInRunner:
    """Samples 7s."""

    def __init__(self):
        self.done, self.dispatched = True, []

    def dispatch(self, schedule):
        self.dispatched.append(schedule)
        return Step(schedule, self)

    def read(self, step):
        assert self.done, "nobody waits for a replica while another one is done"
        return StepResult([[7] * s.samples for s in step.schedule.sequences], None, {})

    def close(self):
        pass


def make_replicas(count):
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, block_size=4, num_blocks=64)
    return [Replica(Scheduler(limits), StandInRunner()) for _ in range(count)]


def make_engine(count):
    return Engine(make_replicas(count), None, eos_token_ids=frozenset(), vocab_size=1000, max_logprobs=0, seed=0)


def queue(replica, request_id, prompt, max_tokens=8):
    request = Request(request_id, prompt, SamplingParams(max_tokens=max_tokens))
    replica.scheduler.add(request)
    return request


def cache(replica, prompt):
    """Have the replica compute a prompt, and finish."""
    request = queue(replica, "cached", prompt, 1)
    replica.scheduler.schedule()
    replica.scheduler.on_tokens(request, [7])
    replica.scheduler.finish(request)


def chosen(replicas, prompt):
    return replicas.index(choose_replica(replicas, Request("new", prompt, SamplingParams())))


def test_without_a_cached_prefix_the_shortest_queue_is_chosen():
    replicas = make_replicas(3)
    assert chosen(replicas, PREFIX) == 0
    queue(replicas[0], "a", [1] * 4)
    queue(replicas[1], "b", [1] * 3)
    queue(replicas[2], "c", [1] * 3, max_tokens=7)
    assert chosen(replicas, PREFIX) == 2


def test_the_longest_cached_prefix_is_chosen():
    replicas = make_replicas(3)
    cache(replicas[1], PREFIX[:16])
    cache(replicas[2], PREFIX)
    assert chosen(replicas, [*PREFIX, 1]) == 2
    assert chosen(replicas, [*PREFIX[:16], 1]) == 1  # as long on both, and both queues are empty


@pytest.mark.parametrize(("queued", "expected"), [(13, 1), (14, 0)])
def test_a_cached_prefix_counts_up_to_a_queue_of_1_25_times_the_mean(queued, expected):
    replicas = make_replicas(2)
    cache(replicas[1], PREFIX)
    queue(replicas[0], "a", [1] * 7, max_tokens=1)
    queue(replicas[1], "b", [1] * (queued - 1), max_tokens=1)
    assert chosen(replicas, [*PREFIX, 1]) == expected


def test_requests_are_spread_evenly():
    engine = make_engine(4)
    for i in range(40):
        engine.add_request(str(i), {"prompt_token_ids": [i] * (1 + i % 7)}, SamplingParams(max_tokens=1 + i % 5))
    queues = [replica.scheduler.num_queued_tokens for replica in engine.replicas]
    assert max(queues) - min(queues) <= 12  # one request's
    assert sum(queues) == sum(1 + i % 7 + 1 + i % 5 for i in range(40))


def test_a_replica_that_is_done_is_read_while_another_works():
    engine = make_engine(2)
    slow, fast = (replica.runner for replica in engine.replicas)
    for i in range(2):
        engine.add_request(str(i), {"prompt_token_ids": [i] * 5}, SamplingParams(max_tokens=6))
    slow.done, finished = False, []
    while not finished:
        finished += engine.step()
    assert [output.request_id for output in finished] == ["1"]
    assert (len(slow.dispatched), len(fast.dispatched)) == (2, 6)  # one that runs and one behind it
    slow.done = True
    while engine.has_unfinished:
        finished += engine.step()
    assert [len(output.outputs[0].token_ids) for output in finished] == [6, 6]
    assert engine.update_gauges().num_generation_tokens == 12
    engine.close()


def test_nobody_waits_for_a_step_that_is_not_to_be_waited_for():
    engine = make_engine(1)
    (replica,) = engine.replicas
    engine.add_request("first", {"prompt_token_ids": [1] * 5}, SamplingParams(max_tokens=2))
    assert replica.wants_attention
    replica.runner.done = False
    assert engine.step(wait=False) == []
    assert not replica.wants_attention  # what may still come should be part of the next step
    for i in range(3):
        engine.add_request(str(i), {"prompt_token_ids": [1] * 5}, SamplingParams(max_tokens=2))
    assert engine.step(wait=False) == engine.step(wait=False) == []
    assert len(replica.runner.dispatched) == 2
    replica.runner.done = True
    assert replica.wants_attention
    finished = []
    while engine.has_unfinished:
        finished += engine.step(wait=False)
    assert sorted(output.request_id for output in finished) == ["0", "1", "2", "first"]
    engine.close()


def test_a_step_may_wait_behind_another_once_all_rows_are_taken():
    engine = make_engine(1)
    (replica,) = engine.replicas
    for i in range(4):
        engine.add_request(str(i), {"prompt_token_ids": [1] * 5}, SamplingParams(max_tokens=4))
    replica.runner.done = False
    engine.step(wait=False)
    assert replica.wants_attention
    engine.step(wait=False)
    assert not replica.wants_attention
    assert len(replica.runner.dispatched) == 2
    replica.runner.done = True
    engine.close()


def test_a_replica_that_fails_ends_the_engine():
    engine = make_engine(2)
    for i in range(2):
        engine.add_request(str(i), {"prompt_token_ids": [i] * 5}, SamplingParams(max_tokens=6))

    def fail(schedule):
        raise RuntimeError("no device")

    engine.replicas[1].runner.dispatch = fail
    with pytest.raises(DeviceError, match="no device"):
        engine.step()
    with pytest.raises(DeviceError, match="failed earlier"):
        engine.step()
    engine.close()


def test_a_second_ctrl_c_ends_the_wait_for_a_device_that_hangs_and_the_engine():
    engine, came = make_engine(1), []
    engine.add_request("a", {"prompt_token_ids": [1] * 5}, SamplingParams(max_tokens=6))

    def hang(step):
        for count in range(3):
            signal.raise_signal(signal.SIGINT)
            came.append(count)

    engine.replicas[0].runner.read = hang
    engine.step()  # dispatches only
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert came == [0]
    with pytest.raises(DeviceError, match="Ctrl-C came twice"):
        engine.step()
    engine.abandon(["a"])
    engine.close()  # waits for nothing
    assert came == [0]


def test_a_second_ctrl_c_ends_the_wait_for_all_replicas(monkeypatch):
    engine = make_engine(2)
    for i in range(2):
        engine.add_request(str(i), {"prompt_token_ids": [i] * 5}, SamplingParams(max_tokens=6))
    for replica in engine.replicas:
        replica.runner.done = False
    engine.step()
    monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    with pytest.raises(DeviceError, match="Ctrl-C came twice"):
        engine.step()
    engine.close()


def test_ctrl_c_while_a_step_compiles_comes_at_once_and_the_step_is_taken_back():
    engine, compiled = make_engine(1), []

    def compile_step(schedule):
        compiled.append(schedule)
        if len(compiled) in (1, 3):
            signal.raise_signal(signal.SIGINT)
            compiled.append("never")

    replica = engine.replicas[0]
    replica.compile = compile_step
    engine.add_request("a", {"prompt_token_ids": [1] * 5}, SamplingParams(max_tokens=6))
    finished, interrupts = [], 0
    while engine.has_unfinished:
        try:
            finished += engine.step()
        except KeyboardInterrupt:
            interrupts += 1
            assert replica.scheduler.num_waiting == 1
            replica.scheduler.check_integrity()
    assert interrupts == 2
    assert "never" not in compiled
    assert finished[0].outputs[0].token_ids == [7] * 6
    assert engine.update_gauges().num_prompt_tokens == 5
    engine.close()
