"""One replica of the model: its scheduler with a prefix cache of its own, its runner, and the steps under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanovllm_jax.engine.request import Request
from nanovllm_jax.engine.schedule import Schedule
from nanovllm_jax.engine.scheduler import Scheduler

if TYPE_CHECKING:  # the host shell decides without JAX
    from nanovllm_jax.step.runner import InFlight, Runner

# A replica whose queue is longer than this many times the mean leaves a prompt to another one, cached prefix or not.
OVERLOAD = 1.25


@dataclass(eq=False)
class Replica:
    """What one replica has; the engine's loop drives it.

    Attributes:
        scheduler: decides each step.
        runner: runs it on the replica's devices.
        in_flight: dispatched steps that are not read yet, the oldest first; at most two.
        compile: has the programs of a step compiled; None where all were at the start.
        lockstep: requests whose next step depends on tokens that only the host can match (bad words of several tokens).
    """

    scheduler: Scheduler
    runner: Runner
    compile: Callable[[Schedule], None] | None = None
    in_flight: deque[InFlight] = field(default_factory=deque)
    lockstep: set[Request] = field(default_factory=set)

    @property
    def wants_attention(self) -> bool:
        """Whether a step is done, or none runs, or one that no request to come can be part of may wait behind it."""
        if not self.in_flight:
            return self.scheduler.has_unfinished
        rows_are_taken = self.scheduler.num_running == self.scheduler.config.max_num_seqs
        return self.in_flight[0].is_ready or (rows_are_taken and len(self.in_flight) < 2)

    def next_schedule(self) -> Schedule | None:
        """The next step if it may be dispatched now: one runs at most while the next one waits on the device."""
        most = 1 if self.lockstep else 2
        return self.scheduler.schedule() if len(self.in_flight) < most else None

    def dispatch(self, schedule: Schedule) -> None:
        """Enqueue a step on the devices."""
        self.in_flight.append(self.runner.dispatch(schedule))


def choose_replica(replicas: Sequence[Replica], request: Request) -> Replica:
    """Where a request goes: to the longest cached prefix of it, unless that replica's queue is too long.

    A queue counts the tokens of all unfinished requests, prompts and the most that they may generate. Where no prefix
    is cached, and among equals, the shortest queue is chosen.
    """
    if len(replicas) == 1:
        return replicas[0]
    queues = [replica.scheduler.num_queued_tokens for replica in replicas]
    most = OVERLOAD * sum(queues) / len(queues)
    hits = [len(replica.scheduler.block_manager.match_prefix(request)) for replica in replicas]
    eligible = [index for index in range(len(replicas)) if queues[index] <= most]
    return replicas[min(eligible, key=lambda index: (-hits[index], queues[index]))]
