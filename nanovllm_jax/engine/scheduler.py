"""Which tokens of which requests the next step computes, within a token budget.

The engine dispatches a step before it reads the tokens of the step before, so a request's state advances
when it is scheduled: `num_computed_tokens` counts what is in flight, `num_unread` the sampled ids that are
still on the device. What is known without them (a finish by length) is decided here; what needs them (stop
ids and strings) costs what is left of this step and the next one, which the engine drops.
"""

from __future__ import annotations

import itertools
from bisect import insort
from heapq import heappop, heappush
from operator import attrgetter

from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.request import NO_ROW, Request, RequestStatus
from nanovllm_jax.engine.schedule import Schedule, ScheduledSequence, SchedulerConfig
from nanovllm_jax.errors import RequestError

_by_rank = attrgetter("rank")


class Scheduler:
    """Requests from `add` to their end: waiting, running (with a row and blocks), finished.

    Waiting requests are served by rank, and so are decodes; the running request of the largest rank gives its
    blocks up when a decode finds none free. The request of the smallest rank therefore always goes on, and
    every request that was added ends.

    Attributes:
        config: limits and policies.
        block_manager: the KV cache's blocks and prefix cache.
        num_preemptions: times a running request lost its row and blocks.
        num_queued_tokens: prompt tokens of all unfinished requests, and the most that they may generate.
        num_waiting: requests that wait for a row or for blocks.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.block_manager = BlockManager(config.num_blocks, config.block_size, config.enable_prefix_caching)
        self.num_preemptions = 0
        self.num_queued_tokens = 0
        self.num_waiting = 0
        self._arrivals = itertools.count()
        self._requests: dict[str, list[Request]] = {}  # unfinished, by request id
        self._waiting: list[tuple[tuple[int, int], Request]] = []  # heap; finished ones leave when they surface
        self._prefilling: list[Request] = []  # running with prompt tokens to compute, smallest rank first
        self._decoding: list[Request] = []  # running and sampled, smallest rank first
        self._free_rows = list(reversed(range(config.max_num_seqs)))
        self._block_size = config.block_size
        self._num_full = 0  # requests among `_decoding` for which the host has a part in sampling each token

    @property
    def has_unfinished(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Requests that hold a row."""
        return len(self._prefilling) + len(self._decoding)

    def check(self, request: Request) -> None:
        """Whether a request can be served; reads only what never changes, so that any thread may ask.

        Raises:
            RequestError: if the prompt is empty or can never fit.
        """
        if request.num_prompt_tokens < 1:
            message = f"The prompt of request {request.request_id!r} is empty; give at least 1 token."
            raise RequestError(message, param="prompt")
        if request.num_prompt_tokens >= self.config.max_total_tokens:
            raise RequestError(self._too_long(request), param="prompt")

    def add(self, request: Request) -> None:
        """Queues a request and resolves its `max_tokens`.

        Raises:
            RequestError: if the prompt can never fit, or the id is in use.
        """
        self.check(request)
        room = self.config.max_total_tokens - request.num_prompt_tokens
        samples = self._requests.setdefault(request.request_id, [])
        if any(other.sample_index == request.sample_index for other in samples):
            message = f"The request id {request.request_id!r} is in use; give each request its own id."
            raise RequestError(message, param="request_id")
        samples.append(request)
        request.max_tokens = min(request.params.max_tokens or room, room)
        request.last_position = request.num_prompt_tokens + request.max_tokens - 1
        self.num_queued_tokens += request.num_prompt_tokens + request.max_tokens
        request.arrival = next(self._arrivals)
        priority = request.priority if self.config.scheduling_policy == "priority" else 0
        request.rank = (priority, request.arrival)
        heappush(self._waiting, (request.rank, request))
        self.num_waiting += 1

    def schedule(self) -> Schedule | None:
        """The next step, or None when nothing can be computed before an unread token is read (or at all)."""
        budget = self.config.max_num_batched_tokens
        if self.config.batching == "mixed":
            decodes = self._decode_rows(1 if self._may_compute_prompts() else self.config.decode_steps)
            # A preemption may have made room for a prompt beside decodes of several tokens; it waits for the next step.
            several = any(sequence.num_tokens > 1 for sequence in decodes)
            prompts = [] if several else self._prompt_chunks(budget - len(decodes))
        else:
            prompts = self._prompt_chunks(budget)
            decodes = [] if prompts else self._decode_rows(self.config.decode_steps)
        if not decodes and not prompts:
            return None
        kind = "decode" if not prompts else "prefill" if not decodes else "mixed"
        sequences = decodes + prompts
        return Schedule(kind, sequences, sum(sequence.num_tokens for sequence in sequences))

    def _prompt_chunks(self, budget: int) -> list[ScheduledSequence]:
        """Chunks of started prompts, then of waiting ones by rank, while budget, rows and blocks last."""
        chunks: list[ScheduledSequence] = []
        for request in list(self._prefilling):
            if budget > 0:
                chunks.append(self._chunk(request, budget, is_admitted=False))
                budget -= chunks[-1].num_tokens
        while budget > 0 and (request := self._admit()):
            chunks.append(self._chunk(request, budget, is_admitted=True))
            budget -= chunks[-1].num_tokens
        return chunks

    def _chunk(self, request: Request, budget: int, is_admitted: bool) -> ScheduledSequence:
        """As many of the request's uncomputed tokens as the budget allows; the last one is sampled from."""
        start = request.num_computed_tokens
        num_tokens = min(budget, request.num_tokens - start)
        request.num_computed_tokens = start + num_tokens
        self.block_manager.register_full_blocks(request)
        samples = request.num_computed_tokens == request.num_tokens
        if samples:
            request.num_unread += 1
            self._prefilling.remove(request)
            insort(self._decoding, request, key=_by_rank)
            self._num_full += request.plan.variant == "full"
        return ScheduledSequence(request, start, num_tokens, samples, False, is_admitted, request.block_ids)

    def _decode_rows(self, most: int) -> list[ScheduledSequence]:
        """Up to `most` tokens of every row that goes on, preempting from the end when the blocks run out."""
        block_size, new = self._block_size, tuple.__new__
        if self._num_full:
            most = 1
        rows: list[ScheduledSequence] = []
        for request in self._decoding:  # a victim never stands before the request that needs its blocks
            start, block_ids = request.num_computed_tokens, request.block_ids
            num_tokens = request.last_position - start
            if num_tokens > most:
                num_tokens = most
            elif num_tokens <= 0:
                continue  # all of its tokens are sampled; it ends when they are read
            room = len(block_ids) * block_size - start
            if room < num_tokens:
                if room and self.block_manager.num_free_blocks == 0:
                    num_tokens = room  # nobody is preempted for tokens that can wait
                elif not self._append_block(request):
                    break
            request.num_computed_tokens = end = start + num_tokens
            request.num_unread += num_tokens
            # Ids that are not read back yet are registered in `on_tokens`.
            if end % block_size < num_tokens and start < len(request.token_ids):
                self.block_manager.register_full_blocks(request)
            # `ScheduledSequence(...)` calls a function in Python first, which is a third of its time.
            rows.append(new(ScheduledSequence, (request, start, num_tokens, True, True, False, block_ids)))
        return rows

    def _may_compute_prompts(self) -> bool:
        return bool(self._prefilling or (self._free_rows and self._first_waiting()))

    def _append_block(self, request: Request) -> bool:
        """A block for the request's next token, if need be from a preempted one; False if that is itself."""
        while self.block_manager.num_free_blocks == 0:
            victim = max(self._prefilling[-1:] + self._decoding[-1:], key=_by_rank)
            self._preempt(victim)
            if victim is request:
                return False
        self.block_manager.append_blocks(request, 1)
        return True

    def _admit(self) -> Request | None:
        """Moves the first waiting request to a row and gives it blocks for all its tokens, if it fits now.

        It has to leave one free block for each running request, so that no decode takes its blocks back soon.
        A preempted request whose last token is not read yet holds the queue up rather than be overtaken.
        """
        request = self._first_waiting()
        if request is None or not self._free_rows or request.num_unread:
            return None
        hits = self.block_manager.match_prefix(request)
        if not self.block_manager.can_allocate(hits, request.num_tokens, reserve=self.num_running):
            return None
        heappop(self._waiting)
        self.num_waiting -= 1
        self.block_manager.allocate(request, hits, request.num_tokens)
        request.num_computed_tokens = len(hits) * self.config.block_size
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
            self.block_manager.num_queried_tokens += request.num_tokens
            self.block_manager.num_hit_tokens += request.num_cached_tokens
        request.status = RequestStatus.RUNNING
        request.row = self._free_rows.pop()
        insort(self._prefilling, request, key=_by_rank)
        return request

    def _first_waiting(self) -> Request | None:
        while self._waiting and self._waiting[0][1].is_finished:
            heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _preempt(self, request: Request) -> None:
        """Back to the waiting queue, to compute prompt and output again; its rank leads its class."""
        self._requeue(request)
        request.num_preemptions += 1
        self.num_preemptions += 1

    def _requeue(self, request: Request) -> None:
        self._leave_row(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        heappush(self._waiting, (request.rank, request))
        self.num_waiting += 1

    def _leave_row(self, request: Request) -> None:
        if request in self._decoding:
            self._decoding.remove(request)
            self._num_full -= request.plan.variant == "full"
        else:
            self._prefilling.remove(request)
        self._free_rows.append(request.row)
        request.row = NO_ROW
        self.block_manager.free(request)

    def on_tokens(self, request: Request, token_ids: list[int]) -> None:
        """Takes tokens read back from the device, in the order of steps; never for a finished request."""
        count, known, block_size = len(token_ids), request.token_ids, self._block_size
        request.num_unread -= count
        known.fromlist(token_ids)  # `extend` takes four times as long
        request.output_token_ids += token_ids
        if len(known) % block_size < count:
            self.block_manager.register_full_blocks(request)

    def distrust(self, request: Request) -> None:
        """Takes a running request's blocks out of the prefix cache: what filled them went wrong on the device."""
        self.block_manager.unregister_blocks(request.block_ids)

    def finish(self, request: Request) -> None:
        """Ends a request and frees what it holds, from any state; a second call changes nothing.

        A decode of it may still be in flight: the device runs steps in order, so whoever gets its blocks
        writes later.
        """
        if request.is_finished:
            return
        if request.status is RequestStatus.RUNNING:
            self._leave_row(request)
        else:
            self.num_waiting -= 1
        request.status = RequestStatus.FINISHED
        self.num_queued_tokens -= request.num_prompt_tokens + request.max_tokens
        samples = self._requests[request.request_id]
        samples.remove(request)
        if not samples:
            del self._requests[request.request_id]

    def abort(self, request_id: str) -> list[Request]:
        """Ends all unfinished samples of a request id and returns them; none if the id is not known."""
        requests = list(self._requests.get(request_id, ()))
        for request in requests:
            self.finish(request)
        return requests

    def on_step_failed(self, schedule: Schedule) -> None:
        """Takes out of the prefix cache what a failed step was to fill; the engine ends its requests."""
        block_size = self.config.block_size
        for _, start, num_tokens, _, _, _, block_ids in schedule.sequences:
            filled = block_ids[start // block_size : (start + num_tokens) // block_size]
            self.block_manager.unregister_blocks(filled)

    def retract(self, schedule: Schedule) -> None:
        """Takes the latest schedule back, of which nothing was dispatched: its requests wait as if preempted.

        What was admitted in it counts as if it never was.
        """
        self.on_step_failed(schedule)
        for sequence in schedule.sequences:
            request = sequence.request
            request.num_unread -= sequence.num_tokens if sequence.is_decode else int(sequence.samples)
            if not sequence.is_admitted:
                self._preempt(request)
                continue
            if request.num_preemptions == 0:
                self.block_manager.num_queried_tokens -= request.num_tokens
                self.block_manager.num_hit_tokens -= request.num_cached_tokens
            self._requeue(request)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. Returns False, and does nothing, while a request runs."""
        return self.block_manager.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Checks rows, queues and blocks against each other.

        Raises:
            RuntimeError: if the bookkeeping is wrong, which is a bug in this package.
        """
        running = self._prefilling + self._decoding
        rows = [request.row for request in running] + self._free_rows
        if sorted(rows) != list(range(self.config.max_num_seqs)):
            raise RuntimeError("Each row must be free or held by one running request.")
        unfinished = list(itertools.chain(*self._requests.values()))
        if self.num_waiting != len(unfinished) - len(running):
            raise RuntimeError("The count of waiting requests differs from those without a row.")
        if self.num_queued_tokens != sum(request.num_prompt_tokens + request.max_tokens for request in unfinished):
            raise RuntimeError("The count of queued tokens differs from the unfinished requests.")
        self.block_manager.check_integrity(running)

    def _too_long(self, request: Request) -> str:
        most, remedy = self.config.max_total_tokens, self.config.length_remedy
        return (
            f"The prompt has {request.num_prompt_tokens} tokens, but prompt and output together may have {most}, so at "
            f"most {most - 1} with room for one more: shorten the prompt{f' or {remedy}' if remedy else ''}."
        )
