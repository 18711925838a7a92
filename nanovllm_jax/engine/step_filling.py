"""Tells when the requests that are queued so far fill a step, so that it can start before the last one is checked."""

from __future__ import annotations

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
