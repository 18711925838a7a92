"""One sequence to generate: its tokens, its place in the KV cache, and how far it has got."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from nanovllm_jax.engine.sampling_plan import SamplingPlan
from nanovllm_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from _hashlib import HASH

NO_ROW = -1


class RequestStatus(Enum):
    """Where a request is. A preempted request is WAITING again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sample of one prompt. The scheduler and the block manager change it; others only read.

    `SamplingParams.n > 1` becomes several requests with the same `request_id` and `sample_index` 0 to n-1.

    Attributes:
        priority: smaller is served first (only with `scheduling_policy="priority"`).
        cache_salt: prompts share cached blocks only within one salt.
        skip_prefix_cache_read: compute every prompt token (prompt_logprobs needs all logits).
        plan: what the device needs of `params`.
        num_prompt_tokens: length of the prompt; at least 1.
        token_ids: the prompt, then every output token that has been read back, as int32: steps and hashes take slices.
        output_token_ids: the output tokens that have been read back.
        max_tokens: output tokens after which it ends with "length"; set by `Scheduler.add`.
        last_position: of its longest output's last token, which is never computed; set by `Scheduler.add`.
        arrival: order of arrival, unique; set by `Scheduler.add`.
        rank: order of service, smallest first; set by `Scheduler.add`.
        row: device row from admission to finish or preemption, else NO_ROW.
        block_ids: block table of the row; blocks are only ever appended while the row is held.
        num_computed_tokens: tokens whose K and V are in the cache or in flight.
        num_unread: tokens sampled (or being sampled) on the device and not yet read back.
        num_cached_tokens: prompt tokens found in the prefix cache when it was first admitted.
        num_preemptions: times it lost its row and blocks.
        block_hashes: digests of its leading tokens up to each full block's end, computed as they are needed.
        hasher: the running hash that gives the next of them; None before the first.
        num_registered_blocks: leading blocks that were offered to the prefix cache or came from it.
    """

    request_id: str
    prompt: InitVar[Iterable[int]]
    params: SamplingParams
    sample_index: int = 0
    priority: int = 0
    cache_salt: str | None = None
    skip_prefix_cache_read: bool = False
    plan: SamplingPlan = field(default_factory=SamplingPlan)

    num_prompt_tokens: int = field(init=False)
    token_ids: array[int] = field(init=False)
    output_token_ids: list[int] = field(init=False, default_factory=list)
    max_tokens: int = field(init=False, default=0)
    last_position: int = field(init=False, default=0)
    arrival: int = field(init=False, default=0)
    rank: tuple[int, int] = field(init=False, default=(0, 0))

    status: RequestStatus = field(init=False, default=RequestStatus.WAITING)
    row: int = field(init=False, default=NO_ROW)
    block_ids: list[int] = field(init=False, default_factory=list)
    num_computed_tokens: int = field(init=False, default=0)
    num_unread: int = field(init=False, default=0)
    num_cached_tokens: int = field(init=False, default=0)
    num_preemptions: int = field(init=False, default=0)
    block_hashes: list[bytes] = field(init=False, default_factory=list)
    hasher: HASH | None = field(init=False, default=None)
    num_registered_blocks: int = field(init=False, default=0)

    def __post_init__(self, prompt: Iterable[int]) -> None:
        self.token_ids = array("i", prompt)
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt as a new list, which costs 20 ns a token."""
        return self.token_ids[: self.num_prompt_tokens].tolist()

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens whose ids the host knows."""
        return len(self.token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether it ended; a token of it that is read back later is to be dropped."""
        return self.status is RequestStatus.FINISHED
