"""What comes back from a step, for the host shell, which needs no JAX to read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanovllm_jax.engine.request import Request


@dataclass(frozen=True)
class TokenLogprobs:
    """Raw log-probabilities of one position: of the token that stands there, its rank (from 1), and of the best."""

    logprob: float
    rank: int
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass
class StepResult:
    """What one step sampled, in the order of its schedule."""

    tokens: list[list[int]]  # drawn for each sequence, in order; -1 where the logits were not finite
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: dict[Request, list[TokenLogprobs]]
