"""What `generate` returns, with vLLM's fields; also answers `out["text"]` as nano-vLLM's dicts do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position, after the model and before any sampling parameter.

    Attributes:
        logprob: natural logarithm of the probability.
        rank: 1 for the most likely token of the vocabulary; None when it was not computed.
        decoded_token: the token as text; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When a request passed each point, in seconds of `time.time()`; None where it has not been.

    Attributes:
        arrival_time: it was added.
        first_scheduled_time: its first step was dispatched.
        first_token_time: its first token was read back.
        finished_time: it ended.
        num_preemptions: times it lost its place in the KV cache and was computed again.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request.

    Attributes:
        index: sample index, 0 to n-1.
        text: generated text; empty with `detokenize=False`.
        token_ids: generated token ids.
        cumulative_logprob: sum of the tokens' log-probabilities; None unless logprobs were asked for.
        logprobs: for each token, token id -> `Logprob`; None unless asked for.
        finish_reason: "stop", "length", "abort" or "error"; None while it runs.
        stop_reason: the stop string or stop token id that ended it; None otherwise, also for end-of-sequence.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether it ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """One request's prompt and samples. `out["text"]` and `out["token_ids"]` are those of the first sample.

    Attributes:
        request_id: id of the request.
        prompt: the prompt as text; None when token ids were given.
        prompt_token_ids: the prompt as token ids.
        prompt_logprobs: for each prompt token but the first, token id -> `Logprob`; None unless asked for.
        outputs: the samples, by index.
        finished: whether all samples ended.
        metrics: when it passed each point.
        num_cached_tokens: prompt tokens found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0

    def __getitem__(self, key: str) -> Any:
        if key == "text":
            return self.outputs[0].text
        if key == "token_ids":
            return self.outputs[0].token_ids
        raise KeyError(f"{key!r}: only 'text' and 'token_ids' are keys; use attributes, such as .outputs[0].")
