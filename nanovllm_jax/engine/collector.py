"""Gathers what the steps sampled into outputs: text, stop checks, log-probabilities, the n samples of a request."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm_jax.engine.detokenizer import Detokenizer
from nanovllm_jax.engine.request import Request
from nanovllm_jax.engine.stats import EngineStats
from nanovllm_jax.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from nanovllm_jax.step.result import TokenLogprobs

# Requests that stream share 8,000 reports a second, so few tokens are reported together where few run and more where
# many do. A report costs the server about 100 us of the interpreter, which the engine needs too: with one a token,
# 256 requests got a quarter of the throughput that they get without streaming.
_REPORT_S = 1 / 8000


@dataclass
class Sample:
    """One sample while it grows."""

    request: Request
    detokenizer: Detokenizer | None
    stream: bool
    num_decoded: int = 0
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    last_token_time: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    stops: frozenset[int] = field(init=False)
    looks_at_tokens: bool = field(init=False)

    def __post_init__(self) -> None:
        params, self.stops = self.request.params, self.request.plan.stop_token_ids
        # Most samples only end by length or by a stop token, which is seen without a look at each token.
        self.looks_at_tokens = params.logprobs is not None or (self.detokenizer is not None and bool(params.stop))


@dataclass
class Group:
    """The samples of one request, and what they share."""

    request_id: str
    prompt: str | None
    stream: bool
    samples: list[Sample]
    prompt_logprobs: list[dict[int, Logprob] | None]
    metrics: RequestMetrics
    prompt_token_ids: list[int] | None = None  # made while the devices work on them
    next_report: float = 0.0  # when it streams again, in s of `time.time()`

    @property
    def finished(self) -> bool:
        """Whether all samples ended."""
        return all(sample.finish_reason for sample in self.samples)


class Collector:
    """Turns sampled tokens into `RequestOutput`s.

    Args:
        tokenizer: None leaves texts empty.
        eos_token_ids: ends that are reported without a stop_reason.
        stats: where latencies and ends are counted.
    """

    def __init__(self, tokenizer: Any | None, eos_token_ids: frozenset[int], stats: EngineStats) -> None:
        self._tokenizer, self._eos, self._stats = tokenizer, eos_token_ids, stats
        # Of the step that is being read: tokens, samples that get their first, and for others s since their last one.
        self._num_tokens = self._num_first = 0
        self._gaps: Counter[float] = Counter()
        # Most rows got their last token with the row before them: these are counted first, by the time of that token.
        self._usual_last = 0.0
        self._num_usual = 0
        self._groups: dict[str, Group] = {}
        self._samples: dict[Request, Sample] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._groups

    def add(self, requests: Sequence[Request], prompt: str | None, *, stream: bool, arrival_time: float) -> None:
        """Start collecting the samples of one request, which arrived at `arrival_time` (of `time.time()`)."""
        samples = [Sample(request, self._detokenizer(request), stream) for request in requests]
        self._samples |= {sample.request: sample for sample in samples}
        first = requests[0]
        self._groups[first.request_id] = Group(
            first.request_id, prompt, stream, samples, [None], RequestMetrics(arrival_time)
        )

    def on_scheduled(self, request: Request, now: float) -> None:
        """Note that a request first ran at `now`, and get ready what its output needs while the devices work."""
        group = self._groups[request.request_id]
        if group.metrics.first_scheduled_time is None:
            group.metrics.first_scheduled_time = now
            group.prompt_token_ids = request.prompt_token_ids
            self._stats.queue_time.observe(now - group.metrics.arrival_time)

    def on_prompt_logprobs(self, request: Request, start: int, logprobs: Sequence[TokenLogprobs]) -> None:
        """Keep the log-probabilities after the tokens at `start` and on; a recomputed prompt adds nothing."""
        group, wanted = self._groups[request.request_id], request.params.prompt_logprobs or 0
        for position, entry in enumerate(logprobs, start + 1):
            if position == len(group.prompt_logprobs) < request.num_prompt_tokens:
                token = request.token_ids[position]
                group.prompt_logprobs.append(self._logprob_dict(token, entry, wanted))

    def on_tokens(
        self, request: Request, tokens: list[int], logprobs: TokenLogprobs | None, now: float
    ) -> tuple[int, FinishReason | None, bool]:
        """Take the tokens that one step sampled, at least one; -1 where the logits were not finite.

        Returns:
            how many of them are output, up to a stop token or to the end; why the sample ends, if it does; whether
            there may be something to report.
        """
        sample, num_taken, reason = self._samples[request], len(tokens), None
        room, stops = request.max_tokens - len(request.output_token_ids), sample.stops
        # What most rows of most steps take: this runs once a row and step, so it asks for no more than it must.
        goes_on = num_taken < room and -1 not in tokens and (not stops or stops.isdisjoint(tokens))
        if not goes_on or sample.looks_at_tokens:
            num_taken, reason = self._find_end(sample, tokens, room)
            sample.finish_reason = reason
            if request.params.logprobs is not None and logprobs is not None and num_taken:
                sample.logprobs.append(self._logprob_dict(tokens[0], logprobs, request.params.logprobs))
                sample.cumulative_logprob += logprobs.logprob
        if num_taken:  # they were read back together: no time passes between them
            self._num_tokens += num_taken
            last, sample.last_token_time = sample.last_token_time, now
            if last is None:
                self._note_first(request, now)
            elif last == self._usual_last:
                self._num_usual += 1
            else:
                self._note_gap(last, now)
        return num_taken, reason, reason is not None or sample.stream

    def _find_end(self, sample: Sample, tokens: list[int], room: int) -> tuple[int, FinishReason | None]:
        """How many of the tokens are output if there is room for so many, and why the sample ends, if it does."""
        request = sample.request
        params, stops = request.params, request.plan.stop_token_ids
        valid = tokens if min(tokens) >= 0 else tokens[: tokens.index(-1)]
        num_taken, reason = len(valid), "error" if len(valid) < len(tokens) else None
        if num_taken >= room:
            num_taken, reason = room, "length"
        stopped = not stops.isdisjoint(valid[:num_taken])
        if stopped:
            num_taken = next(i for i, token in enumerate(valid, 1) if token in stops)
            token, reason = valid[num_taken - 1], "stop"
            sample.stop_reason = None if token in self._eos and token not in (params.stop_token_ids or ()) else token
        if sample.detokenizer and params.stop:
            for i, token in enumerate(valid[: num_taken - stopped], 1):
                stop = sample.detokenizer.append([token])
                sample.num_decoded += 1
                if stop is not None:
                    sample.stop_reason = stop
                    return i, "stop"
        return num_taken, reason

    def _note_first(self, request: Request, now: float) -> None:
        self._num_first += 1
        metrics = self._groups[request.request_id].metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            self._stats.time_to_first_token.observe(now - metrics.arrival_time)

    def _note_gap(self, last: float, now: float) -> None:
        """Count the time since a sample's last token, where it is not that of the row before."""
        if self._num_usual:
            self._gaps[now - self._usual_last] += self._num_usual
        self._usual_last, self._num_usual = last, 1

    def end_step(self, now: float) -> None:
        """Count the tokens of a step that was read at `now` and the times between them."""
        if self._num_usual:
            self._gaps[now - self._usual_last] += self._num_usual
        self._usual_last, self._num_usual = 0.0, 0
        together = self._num_tokens - self._num_first - self._gaps.total()
        for gap, count in (*self._gaps.items(), (0.0, together)):
            self._stats.inter_token_latency.observe(gap, count)
        self._stats.num_generation_tokens += self._num_tokens
        self._gaps.clear()
        self._num_tokens = self._num_first = 0

    def end(self, request_id: str, reason: FinishReason) -> None:
        """Note why all samples of a request end that have not yet; an error leaves them without text."""
        for sample in self._groups[request_id].samples:
            sample.finish_reason = sample.finish_reason or reason
            if reason == "error":
                sample.detokenizer = None

    def take_output(self, request_id: str, now: float) -> RequestOutput | None:
        """The request's output if it finished (it is then forgotten) or streams and it is time to report, else None."""
        group = self._groups[request_id]
        if not group.finished and not (group.stream and now >= group.next_report):
            return None
        output = self._output(group)
        group.next_report = now + self._stats.num_running * _REPORT_S
        if group.finished:
            self._forget(group)
        return output

    def _forget(self, group: Group) -> None:
        del self._groups[group.request_id]
        for sample in group.samples:
            del self._samples[sample.request]
            self._stats.num_finished[sample.finish_reason or "error"] += 1
        if group.metrics.finished_time is not None:
            self._stats.e2e_latency.observe(group.metrics.finished_time - group.metrics.arrival_time)

    def _output(self, group: Group) -> RequestOutput:
        first = group.samples[0].request
        if group.finished:
            group.metrics.finished_time = time.time()
        group.metrics.num_preemptions = sum(s.request.num_preemptions for s in group.samples)
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids or first.prompt_token_ids,
            outputs=[self._completion(sample) for sample in group.samples],
            finished=group.finished,
            prompt_logprobs=group.prompt_logprobs if first.params.prompt_logprobs is not None else None,
            metrics=group.metrics,
            num_cached_tokens=first.num_cached_tokens,
        )

    def _completion(self, sample: Sample) -> CompletionOutput:
        request = sample.request
        wanted = request.params.logprobs is not None
        return CompletionOutput(
            index=request.sample_index,
            text=self._text(sample),
            token_ids=list(request.output_token_ids),
            cumulative_logprob=sample.cumulative_logprob if wanted else None,
            logprobs=list(sample.logprobs) if wanted else None,
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
        )

    def _text(self, sample: Sample) -> str:
        if sample.detokenizer is None:
            return ""
        ids = sample.request.output_token_ids
        ended_by_token = sample.finish_reason == "stop" and not isinstance(sample.stop_reason, str)
        shown = len(ids) - (ended_by_token and not sample.request.params.include_stop_str_in_output)
        sample.detokenizer.append(ids[sample.num_decoded : shown])
        sample.num_decoded = max(sample.num_decoded, shown)
        return sample.detokenizer.text(finished=sample.finish_reason is not None)

    def _detokenizer(self, request: Request) -> Detokenizer | None:
        params = request.params
        if self._tokenizer is None or not params.detokenize:
            return None
        return Detokenizer(
            self._tokenizer,
            request.token_ids,
            stop=params.stop or (),
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )

    def _logprob_dict(self, token: int, entry: TokenLogprobs, wanted: int) -> dict[int, Logprob]:
        """The token that stands there first, then the best ones, as vLLM orders them."""
        found = {token: Logprob(entry.logprob, entry.rank, self._decode(token))}
        for rank, (other, logprob) in enumerate(
            zip(entry.top_ids[:wanted].tolist(), entry.top_logprobs[:wanted].tolist(), strict=True), 1
        ):
            if other not in found:
                found[other] = Logprob(logprob, rank, self._decode(other))
        return found

    def _decode(self, token: int) -> str | None:
        return self._tokenizer.decode([token]) if self._tokenizer is not None else None
