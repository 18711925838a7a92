"""The scheduler's limits, and what it hands to the device side: one step as a list of sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from nanovllm_jax.engine.request import Request
from nanovllm_jax.errors import ConfigError


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits and policies of the scheduler.

    Attributes:
        max_num_seqs: rows, the requests that run at the same time.
        max_num_batched_tokens: tokens computed in one step.
        max_model_len: prompt and output tokens of one request.
        block_size: tokens in a block of the KV cache.
        num_blocks: blocks in the KV cache.
        scheduling_policy: "fcfs" serves by arrival, "priority" by priority, then arrival.
        batching: "prefill_first" computes prompts alone while any wait and fit; "mixed" decodes every row in
            every step and gives prompts the rest of the budget.
        enable_prefix_caching: share blocks between requests with equal prefixes.
        decode_steps: most tokens that a decode step computes for each row, one after the other, before the host
            looks at them; at most block_size.
        length_remedy: what allows longer prompts, for the message to those that are too long; None: nothing does.

    Raises:
        ConfigError: if a limit is not positive, or the budget does not hold one token a row.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    batching: Literal["prefill_first", "mixed"] = "prefill_first"
    enable_prefix_caching: bool = True
    decode_steps: int = 1
    length_remedy: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "num_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs "
                f"{self.max_num_seqs}; a decode step computes one token a sequence. Raise the first or lower "
                "the second."
            )
        if not 1 <= self.decode_steps <= self.block_size:
            raise ConfigError(
                f"decode_steps is {self.decode_steps}; it must be at least 1 and at most block_size {self.block_size}, "
                "so that a row opens at most one block a step."
            )

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt with its output: the model's limit, or what the whole KV cache holds if less."""
        return min(self.max_model_len, self.num_blocks * self.block_size)


class ScheduledSequence(NamedTuple):
    """What one step computes of one request: its tokens at positions `start` to `start + num_tokens - 1`.

    Attributes:
        request: the request; its `row` and `block_ids` are those of this step until the next `schedule()`.
        start: position of the first token.
        num_tokens: tokens to compute; of a decode in a decode step at most `decode_steps`, in a mixed step 1.
        samples: whether the step samples: a decode one token for each that it computes, else the request's next one.
        is_decode: the first token is the row's last sampled one, whose id may still be on the device.
        is_admitted: first step of the request in its row; the row's former state is void.
        block_ids: the request's block table, complete for this step.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    is_decode: bool
    is_admitted: bool
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step: decodes first, then chunks of prompts."""

    kind: Literal["prefill", "decode", "mixed"]
    sequences: list[ScheduledSequence]
    num_tokens: int

    @property
    def is_decode(self) -> bool:
        """Whether every sequence is a decode."""
        return self.kind == "decode"
