"""Random lives of scheduler and block manager, with a simulated device that holds them to their invariants.

The device stores in each KV slot which prefix was written there. Every sampled token depends on the whole
prefix as read back through the block table, so a wrong hit, a slot written twice or a lost block shows as a
failed check or as an output that differs from the one computed without any scheduling.
"""

from collections import deque
from zlib import crc32

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanovllm_jax.engine.request import Request, RequestStatus
from nanovllm_jax.engine.scheduler import Schedule, Scheduler, SchedulerConfig
from nanovllm_jax.errors import RequestError
from nanovllm_jax.sampling_params import SamplingParams

VOCAB = 3
SHARED_PREFIX = [crc32(bytes([i])) % VOCAB for i in range(16)]
PROMPTS = st.fixed_dictionaries(
    {
        "shared": st.integers(0, len(SHARED_PREFIX)),
        "tail": st.lists(st.integers(0, VOCAB - 1), max_size=4),
        "max_tokens": st.one_of(st.none(), st.integers(1, 16)),
        "stop": st.one_of(st.none(), st.integers(0, VOCAB)),
        "priority": st.integers(-1, 1),
        "salt": st.sampled_from([None, None, "a"]),
        "skip_read": st.sampled_from([False, False, False, True]),
        "num_samples": st.sampled_from([1, 1, 1, 2]),
    }
)


def next_token(token_ids: list[int]) -> int:
    """The model: a token that depends on every token before it."""
    return crc32(bytes(token_ids)) % VOCAB


def reference_output(request: Request) -> list[int]:
    """What the request generates when it runs alone, without cache or batching."""
    token_ids, output = list(request.prompt_token_ids), []
    while len(output) < request.max_tokens and not set(output) & set(request.params.stop_token_ids or ()):
        output.append(next_token(token_ids))
        token_ids.append(output[-1])
    return output


class Device:
    """Rows, block tables and KV slots as the steps leave them, in the order in which they are dispatched."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.slots: dict[int, int] = {}  # slot -> prefix id
        self.block_owner: dict[int, Request] = {}  # who may write
        self.row_owner: dict[int, Request] = {}
        self.row_table: dict[int, list[int]] = {}
        self.sequences: dict[Request, list[int]] = {}  # prompt and all sampled tokens, read or not
        self.prefix_ids: dict[tuple[object, int], int] = {}

    def run(self, schedule: Schedule) -> list[list[int]]:
        """Executes one step, a pass for each token that decodes compute. Returns the tokens of each sequence."""
        self.accept(schedule)
        sampled: list[list[int]] = [[] for _ in schedule.sequences]
        for index in range(max(one.num_tokens if one.is_decode else 1 for one in schedule.sequences)):
            # A pass writes all of its tokens before it reads any.
            taking_part = [
                (one._replace(start=one.start + index, num_tokens=1) if one.is_decode else one, tokens)
                for one, tokens in zip(schedule.sequences, sampled, strict=True)
                if index < (one.num_tokens if one.is_decode else 1)
            ]
            for sequence, _ in taking_part:
                self._write(sequence)
            for sequence, tokens in taking_part:
                tokens += self._read_and_sample(sequence)
        return sampled

    def accept(self, schedule: Schedule) -> None:
        """Takes over rows and new blocks, as a step does before it computes."""
        rows = [sequence.request.row for sequence in schedule.sequences]
        assert len(set(rows)) == len(rows)
        for sequence in schedule.sequences:
            row, request = sequence.request.row, sequence.request
            assert row in range(self.config.max_num_seqs)
            if sequence.is_admitted:
                self.row_owner[row] = request
                assert sequence.start == 0 or not request.skip_prefix_cache_read
                fresh = sequence.block_ids[sequence.start // self.config.block_size :]
            else:
                known = self.row_table[row]
                assert self.row_owner[row] is request
                assert sequence.block_ids[: len(known)] == known
                fresh = sequence.block_ids[len(known) :]
            self.row_table[row] = list(sequence.block_ids)
            for block_id in fresh:
                self.block_owner[block_id] = request
                for slot in range(block_id * self.config.block_size, (block_id + 1) * self.config.block_size):
                    self.slots.pop(slot, None)

    def _prefix_ids(self, request: Request, end: int) -> list[int]:
        ids: list[int] = []
        for token in self.sequences[request][:end]:
            parent = ids[-1] if ids else ("salt", request.cache_salt)
            ids.append(self.prefix_ids.setdefault((parent, token), len(self.prefix_ids)))
        return ids

    def _slot(self, sequence, position: int) -> int:
        block_size = self.config.block_size
        return sequence.block_ids[position // block_size] * block_size + position % block_size

    def _write(self, sequence) -> None:
        request, end = sequence.request, sequence.start + sequence.num_tokens
        true_tokens = self.sequences.setdefault(request, list(request.prompt_token_ids))
        if sequence.is_decode:
            assert end == len(true_tokens), "a decode computes the last sampled token"
        else:
            assert list(request.token_ids[sequence.start : end]) == true_tokens[sequence.start : end]
        prefix_ids = self._prefix_ids(request, end)
        for position in range(sequence.start, end):
            slot = self._slot(sequence, position)
            assert self.block_owner[sequence.block_ids[position // self.config.block_size]] is request
            assert slot not in self.slots, "a slot is written once"
            self.slots[slot] = prefix_ids[position]

    def _read_and_sample(self, sequence) -> list[int]:
        request, end = sequence.request, sequence.start + sequence.num_tokens
        for position, prefix_id in enumerate(self._prefix_ids(request, end)):
            assert self.slots.get(self._slot(sequence, position)) == prefix_id
        if not sequence.samples:
            return []
        true_tokens = self.sequences[request]
        assert end == len(true_tokens), "only the last known token is sampled from"
        true_tokens.append(next_token(true_tokens))
        return true_tokens[-1:]


class HostShellMachine(RuleBasedStateMachine):
    @initialize(
        max_num_seqs=st.integers(1, 4),
        extra_budget=st.integers(0, 20),
        block_size=st.integers(1, 4),
        num_blocks=st.integers(2, 14),
        max_model_len=st.integers(8, 40),
        policy=st.sampled_from(["fcfs", "priority"]),
        batching=st.sampled_from(["prefill_first", "mixed"]),
        caching=st.sampled_from([True, True, True, False]),
        depth=st.integers(0, 2),
        decode_steps=st.integers(1, 4),
    )
    def start(
        self,
        max_num_seqs,
        extra_budget,
        block_size,
        num_blocks,
        max_model_len,
        policy,
        batching,
        caching,
        depth,
        decode_steps,
    ):
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_budget,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=num_blocks,
            scheduling_policy=policy,
            batching=batching,
            enable_prefix_caching=caching,
            decode_steps=min(decode_steps, block_size),
        )
        self.scheduler = Scheduler(self.config)
        self.device = Device(self.config)
        self.depth = depth  # steps dispatched beyond the one that is read
        self.in_flight: deque[tuple[Schedule, list[list[int]]]] = deque()
        self.requests: list[Request] = []
        self.num_added = 0

    @rule(prompts=st.lists(PROMPTS, min_size=1, max_size=6))
    def add(self, prompts):
        for prompt in prompts:
            self.add_one(**prompt)

    def add_one(self, shared, tail, max_tokens, stop, priority, salt, skip_read, num_samples):
        prompt = SHARED_PREFIX[:shared] + tail
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=None if stop is None else [stop])
        self.num_added += 1
        for index in range(num_samples):
            request = Request(str(self.num_added), prompt, params, index, priority, salt, skip_read)
            if not 1 <= len(prompt) < self.config.max_total_tokens:
                with pytest.raises(RequestError):
                    self.scheduler.add(request)
            else:
                self.scheduler.add(request)
                self.requests.append(request)

    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.step_once()

    def step_once(self):
        schedule = self.checked_schedule()
        if schedule is None:
            if self.in_flight:
                self.read()
            else:
                assert not self.scheduler.has_unfinished, "nothing in flight, yet nothing can be scheduled"
            return
        self.in_flight.append((schedule, self.device.run(schedule)))
        while len(self.in_flight) > self.depth:
            self.read()

    def checked_schedule(self) -> Schedule | None:
        preemptions = {request: request.num_preemptions for request in self.running()}
        schedule = self.scheduler.schedule()
        if schedule is None:
            return None
        sequences = schedule.sequences
        assert schedule.num_tokens == sum(sequence.num_tokens for sequence in sequences)
        in_a_pass = sum(1 if sequence.is_decode else sequence.num_tokens for sequence in sequences)
        assert 0 < in_a_pass <= self.config.max_num_batched_tokens
        assert all(sequence.num_tokens == 1 for sequence in sequences if sequence.is_decode) or schedule.is_decode
        assert all(sequence.num_tokens <= self.config.decode_steps for sequence in sequences if sequence.is_decode)
        assert schedule.kind == "mixed" or len({sequence.is_decode for sequence in sequences}) == 1
        assert schedule.kind != "mixed" or self.config.batching == "mixed"
        victims = [request for request, count in preemptions.items() if request.num_preemptions > count]
        kept = [sequence.request for sequence in sequences if not sequence.is_admitted]
        assert all(request.rank < victim.rank for request in kept for victim in victims)
        return schedule

    @precondition(lambda self: self.in_flight)
    @rule()
    def read(self):
        schedule, tokens = self.in_flight.popleft()
        for sequence, sampled in zip(schedule.sequences, tokens, strict=True):
            for token in sampled:
                if not sequence.request.is_finished:
                    self.take(sequence.request, token)

    def take(self, request, token):
        self.scheduler.on_tokens(request, [token])
        stopped = token in (request.params.stop_token_ids or ())
        if stopped or len(request.output_token_ids) >= request.max_tokens:
            assert request.output_token_ids == reference_output(request)
            self.finish(request)

    def finish(self, request):
        self.scheduler.finish(request)
        self.requests.remove(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        victim = data.draw(st.sampled_from(self.requests))
        for request in self.scheduler.abort(victim.request_id):
            assert request.is_finished
            self.requests.remove(request)
        assert victim not in self.requests

    @rule(read_first=st.booleans())
    def fail_step(self, read_first):
        schedule = self.checked_schedule()
        if schedule is None:
            return
        self.device.accept(schedule)
        if read_first:
            while self.in_flight:
                self.read()
        self.scheduler.on_step_failed(schedule)
        for sequence in schedule.sequences:
            if not sequence.request.is_finished:
                self.finish(sequence.request)

    @rule()
    def retract_step(self):
        schedule = self.checked_schedule()
        if schedule is not None:
            self.scheduler.retract(schedule)

    @rule()
    def reset_prefix_cache(self):
        assert self.scheduler.reset_prefix_cache() == (not self.running())

    def running(self) -> list[Request]:
        return [request for request in self.requests if request.status is RequestStatus.RUNNING]

    @invariant()
    def blocks_add_up(self):
        self.scheduler.check_integrity()
        held = {block_id for request in self.running() for block_id in request.block_ids}
        assert len(held) + self.scheduler.block_manager.num_free_blocks == self.config.num_blocks
        assert self.scheduler.num_running == len(self.running())
        assert self.scheduler.num_waiting == len(self.requests) - len(self.running())

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            if not self.scheduler.has_unfinished:
                break
            self.step_once()
        assert not self.requests, "every request that fits ends"
        self.blocks_add_up()
        assert self.scheduler.block_manager.num_free_blocks == self.config.num_blocks


COMMON = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


class TestHostShell(HostShellMachine.TestCase):
    settings = settings(max_examples=2_000, stateful_step_count=12, **COMMON)


@pytest.mark.slow
class TestHostShellLong(HostShellMachine.TestCase):
    settings = settings(max_examples=50_000, stateful_step_count=12, **COMMON)
