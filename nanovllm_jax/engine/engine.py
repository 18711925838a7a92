"""The loop: schedule a step, dispatch it, and read the step before it while the device works."""

from __future__ import annotations

import gc
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np

from nanovllm_jax.engine.collector import Collector
from nanovllm_jax.engine.inputs import Prompt, bad_word_ids, parse_prompt
from nanovllm_jax.engine.request import Request
from nanovllm_jax.engine.sampling_plan import plan_sampling
from nanovllm_jax.engine.schedule import Schedule
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.engine.stats import EngineStats
from nanovllm_jax.errors import DeviceError, RequestError
from nanovllm_jax.outputs import FinishReason, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.step.runner import InFlight, Runner, TokenLogprobs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRequest:
    """A request that was checked and tokenised; `Engine.enqueue` takes it."""

    request_id: str
    samples: list[Request]
    text: str | None
    stream: bool
    arrival_time: float

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self.samples[0].num_prompt_tokens


class Engine:
    """Requests in, outputs out, one step at a time. `nanovllm_jax.engine.build.build_engine` makes one.

    Only `prepare` may be called from any thread; all else belongs to the one that steps.

    Args:
        scheduler: decides each step.
        runner: runs it.
        tokenizer: None if the engine deals in token ids alone.
        eos_token_ids: the model's end ids.
        vocab_size: V.
        max_logprobs: most log-probabilities a token that a request may ask for.
        seed: of the seeds that requests without one get; None takes fresh entropy.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: Any | None,
        *,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        max_logprobs: int,
        seed: int | None,
    ) -> None:
        self.scheduler, self.runner, self.tokenizer = scheduler, runner, tokenizer
        self._eos, self._vocab_size, self._max_logprobs = eos_token_ids, vocab_size, max_logprobs
        self._seeds = np.random.default_rng(seed)
        self.stats = EngineStats()
        self._collector = Collector(tokenizer, eos_token_ids, self.stats)
        # Marks each dispatched step in a profiler's trace; only set while one is taken.
        self.annotate_step: Callable[[Schedule], AbstractContextManager[object]] | None = None
        self._in_flight: InFlight | None = None
        self._failure: Exception | None = None
        self._closed = False
        # Requests whose next step depends on tokens that only the host can match (bad words of several tokens).
        self._lockstep: set[Request] = set()

    @property
    def has_unfinished(self) -> bool:
        """Whether a request waits or runs."""
        return self.scheduler.has_unfinished

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int = 0, stream: bool = False
    ) -> None:
        """Queue a prompt.

        Args:
            request_id: unique among unfinished requests.
            prompt: text, token ids, or a dict of either with an optional `cache_salt`.
            params: how to sample.
            priority: smaller is served first, with scheduling_policy="priority".
            stream: report the request after each of its steps, not only at its end.

        Raises:
            RequestError: if the prompt or the parameters cannot be served.
            DeviceError: if the engine failed or was closed.
        """
        self.enqueue(self.prepare(request_id, prompt, params, priority=priority, stream=stream))

    def prepare(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int = 0, stream: bool = False
    ) -> PreparedRequest:
        """The first half of `add_request`: check and tokenise, in any thread.

        Raises:
            RequestError: if the prompt or the parameters cannot be served.
            DeviceError: if the engine failed or was closed.
        """
        self._check_alive()
        arrival_time = time.time()
        parsed = parse_prompt(prompt, self.tokenizer, self._vocab_size)
        self._check_logprobs(params)
        words = bad_word_ids(params.bad_words or (), self.tokenizer)
        seed = params.seed if params.seed is not None else int(self._seeds.integers(2**63))
        requests = [
            Request(
                request_id,
                parsed.token_ids,
                params,
                sample_index=index,
                priority=priority,
                cache_salt=parsed.cache_salt,
                skip_prefix_cache_read=params.prompt_logprobs is not None,
                plan=plan_sampling(
                    params,
                    seed=seed,
                    sample_index=index,
                    eos_token_ids=self._eos,
                    bad_words=words,
                    vocab_size=self._vocab_size,
                ),
            )
            for index in range(params.n)
        ]
        self.scheduler.check(requests[0])
        return PreparedRequest(request_id, requests, parsed.text, stream, arrival_time)

    def enqueue(self, prepared: PreparedRequest) -> None:
        """The second half of `add_request`: queue it for the next step.

        Raises:
            RequestError: if it can never fit, or its id is in use.
            DeviceError: if the engine failed or was closed.
        """
        self._check_alive()
        if prepared.request_id in self._collector:
            message = f"The request id {prepared.request_id!r} is in use; give each request its own id."
            raise RequestError(message, param="request_id")
        for request in prepared.samples:  # all or none: the first one raises if the request cannot be served
            self.scheduler.add(request)
            if request.plan.bad_words:
                self._lockstep.add(request)
        self._collector.add(prepared.samples, prepared.text, stream=prepared.stream, arrival_time=prepared.arrival_time)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request; returns what it has got so far, None for unknown ids."""
        if request_id not in self._collector:
            return None
        return self._end(request_id, "abort")

    def update_gauges(self) -> EngineStats:
        """Bring the figures up to date that are not counted as they happen, and return all."""
        stats, scheduler, blocks = self.stats, self.scheduler, self.scheduler.block_manager
        stats.num_running, stats.num_waiting = scheduler.num_running, scheduler.num_waiting
        stats.cache_usage = 1 - blocks.num_free_blocks / blocks.num_blocks
        stats.num_queried_tokens, stats.num_hit_tokens = blocks.num_queried_tokens, blocks.num_hit_tokens
        stats.num_preemptions = scheduler.num_preemptions
        return stats

    def step(self) -> list[RequestOutput]:
        """Dispatch the next step and read the one before it.

        Returns:
            Outputs of requests that finished, and of those that stream and got tokens.

        Raises:
            DeviceError: if the device fails; every request ends and the engine is of no more use.
            KeyboardInterrupt: after the step, if Ctrl-C came during it, since the device state it hands on would
                be lost in its middle.
        """
        self._check_alive()
        with _deferred_interrupt():
            outputs: list[RequestOutput] = []
            if self._lockstep:
                outputs += self._read()
            schedule = self.scheduler.schedule()
            dispatched = self._dispatch(schedule) if schedule else None
            outputs += self._read()
            self._in_flight = dispatched
            return outputs

    def wait(self) -> None:
        """Until the device has done what was dispatched; its tokens stay for the next `step`."""
        if self._in_flight is not None:
            self._in_flight.tokens.block_until_ready()

    def drain(self) -> None:
        """Read what is in flight; nothing of aborted requests is left on the device."""
        if self._failure is None and not self._closed:
            with _deferred_interrupt():
                self._read()

    def close(self) -> None:
        """End all requests and give the device memory back."""
        if not self._closed:
            self.drain()
            self._closed = True
            self.runner.close()
            gc.unfreeze()  # what the start froze may be collected, should another engine follow

    def _dispatch(self, schedule: Schedule) -> InFlight:
        for sequence in schedule.sequences:
            if sequence.is_admitted:
                self._collector.on_scheduled(sequence.request)
                if sequence.request.num_preemptions == 0:
                    self.stats.num_prompt_tokens += sequence.request.num_prompt_tokens
        try:
            with self.annotate_step(schedule) if self.annotate_step else nullcontext():
                return self.runner.dispatch(schedule)
        except Exception as error:
            self.scheduler.on_step_failed(schedule)
            raise self._fail(error) from error

    def _read(self) -> list[RequestOutput]:
        """Take the tokens of the step in flight, if there is one."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return []
        try:
            result = self.runner.read(step)
        except Exception as error:
            raise self._fail(error) from error
        now = time.time()
        touched: dict[str, None] = {}
        outputs: list[RequestOutput | None] = []
        for index, sequence in enumerate(step.schedule.sequences):
            request = sequence.request
            if request.is_finished:
                continue  # it ended while this step was in flight
            try:
                if request in result.prompt_logprobs and request.sample_index == 0:
                    self._collector.on_prompt_logprobs(request, sequence.start, result.prompt_logprobs[request])
                if result.tokens[index]:
                    self._take(request, result.tokens[index], result.logprobs[index] if result.logprobs else None, now)
                    touched[request.request_id] = None
            except Exception:
                touched.pop(request.request_id, None)
                outputs.append(self._give_up(request.request_id))
        for request_id in touched:
            try:
                outputs.append(self._collector.take_output(request_id, now))
            except Exception:
                outputs.append(self._give_up(request_id))
        return [output for output in outputs if output is not None]

    def _take(self, request: Request, tokens: list[int], logprobs: TokenLogprobs | None, now: float) -> None:
        """Take a request's tokens of one step up to its end; what was decoded behind is dropped."""
        reason, num_taken = None, 0
        for token in tokens:
            if token < 0:  # non-finite logits
                reason = self._collector.on_finish(request, "error")
            else:
                self.scheduler.on_token(request, token)
                num_taken += 1
                reason = self._collector.on_token(request, token, logprobs)
            if reason:
                self.scheduler.finish(request)
                self._lockstep.discard(request)
                break
        if num_taken:
            self._collector.note_time(request, num_taken, now)

    def _give_up(self, request_id: str) -> RequestOutput | None:
        """End a request whose tokens could not be taken: what is wrong with it must not end the others."""
        logger.exception("request %s ends with an error; the others go on", request_id)
        return self._end(request_id, "error")

    def _end(self, request_id: str, reason: FinishReason) -> RequestOutput | None:
        for request in self.scheduler.abort(request_id):
            self._lockstep.discard(request)
        self._collector.end(request_id, reason)
        try:
            return self._collector.take_output(request_id, time.time())
        except Exception:
            if reason == "error":
                raise
            return self._give_up(request_id)

    def _fail(self, error: Exception) -> DeviceError:
        self._failure = error
        return DeviceError(
            f"The device failed in a step: {error}. Its state is lost: close this engine and make a new one."
        )

    def _check_alive(self) -> None:
        if self._closed:
            raise DeviceError("The engine is closed; make a new LLM.")
        if self._failure is not None:
            raise DeviceError(f"The engine failed earlier ({self._failure}); close it and make a new one.")

    def _check_logprobs(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and not 0 <= value <= self._max_logprobs:
                raise RequestError(
                    f"{name} is {value}; this engine returns 0 to {self._max_logprobs} a token: ask for fewer, or "
                    "raise max_logprobs when you make the LLM.",
                    param=name,
                )


@contextmanager
def _deferred_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends (where signals can be handled: in the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending and callable(previous):
        previous(*pending[0])
