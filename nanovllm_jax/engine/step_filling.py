"""Tells when the requests so far fill a step, so that it can start before the last one is checked."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm_jax.engine.engine import PreparedRequest
from nanovllm_jax.engine.request import Request
from nanovllm_jax.engine.scheduler import Scheduler


class StepFilling:
    """What is left of an idle engine's next step while requests are queued for it.

    Hits in the prefix cache are counted out, those on blocks of this same step too, so a step that starts when it is
    full computes what it would have computed with all requests in the queue. With scheduling_policy="priority" it is
    never full: its first place may belong to the request that comes last.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        config = scheduler.config
        self._blocks = scheduler.block_manager
        self._in_order = config.scheduling_policy == "fcfs"
        self._tokens, self._rows = config.max_num_batched_tokens, config.max_num_seqs
        self._to_come: set[bytes] = set()  # hashes of the blocks that the step fills

    @property
    def is_full(self) -> bool:
        """Whether no later request can be part of the step."""
        return self._in_order and (self._tokens <= 0 or self._rows <= 0)

    def add(self, request: Request) -> None:
        """Count a queued request in."""
        self._tokens -= request.num_tokens - self._blocks.count_hits(request, self._to_come)
        self._rows -= 1


class HeldBack:
    """Requests that are tokenised while the devices work, until they fill a step or a replica stands idle.

    With batching="prefill_first" no row goes on while a prompt waits that can have one: prompts that are queued as soon
    as they are tokenised would hold up all rows for many small steps (20,000 short texts over a clock of 6 ms a decode
    step: 15.8 s, held back 4.5).
    """

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        self._schedulers = schedulers
        self._tokens_of_a_step = sum(scheduler.config.max_num_batched_tokens for scheduler in schedulers)
        self._held: list[PreparedRequest] = []
        self._num_samples = self._num_tokens = 0

    def add(self, prepared: PreparedRequest) -> None:
        """Hold one more."""
        self._held.append(prepared)
        self._num_samples += len(prepared.samples)
        self._num_tokens += prepared.num_prompt_tokens

    @property
    def is_due(self) -> bool:
        """Whether they should be queued: they fill all free rows or a step, or a replica has nothing else to do."""
        if not all(scheduler.has_unfinished for scheduler in self._schedulers):
            return True
        free_rows = sum(scheduler.config.max_num_seqs - scheduler.num_running for scheduler in self._schedulers)
        return self._num_samples >= free_rows or self._num_tokens >= self._tokens_of_a_step

    def take(self) -> list[PreparedRequest]:
        """All of them, in order; none is held any more."""
        held, self._held, self._num_samples, self._num_tokens = self._held, [], 0, 0
        return held
