"""The loop: schedule a step of each replica, dispatch it, and read the step before it while the devices work."""

from __future__ import annotations

import atexit
import gc
import itertools
import logging
import operator
import random
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from nanovllm_jax.engine.collector import Collector
from nanovllm_jax.engine.inputs import Prompt, bad_word_ids, parse_prompt
from nanovllm_jax.engine.interrupts import deferred_interrupt, held_interrupts
from nanovllm_jax.engine.replica import Replica, choose_replica
from nanovllm_jax.engine.request import Request, RequestStatus
from nanovllm_jax.engine.sampling_plan import plan_sampling
from nanovllm_jax.engine.schedule import Schedule, ScheduledSequence
from nanovllm_jax.engine.stats import EngineStats
from nanovllm_jax.errors import DeviceError, RequestError
from nanovllm_jax.outputs import FinishReason, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.step.result import StepResult

logger = logging.getLogger(__name__)

# Between two looks at replicas that all work. Short beside a step (0.3 ms at the least), long beside a look (1 us).
_POLL_S = 50e-6


class PreparedRequest(NamedTuple):
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

    Only `prepare` may be called from any thread; all else belongs to the one that steps. Replicas do not wait for each
    other: each has its own steps under way, and whichever is ready first is read first.

    Args:
        replicas: at least one; requests are spread over them.
        tokenizer: None if the engine deals in token ids alone.
        eos_token_ids: the model's end ids.
        vocab_size: V.
        max_logprobs: most log-probabilities a token that a request may ask for.
        seed: of the seeds that requests without one get; None takes fresh entropy.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        tokenizer: Any | None,
        *,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        max_logprobs: int,
        seed: int | None,
    ) -> None:
        self.replicas, self.tokenizer = tuple(replicas), tokenizer
        self._eos, self._vocab_size, self._max_logprobs = eos_token_ids, vocab_size, max_logprobs
        self._seeds = random.Random(seed)
        self.stats = EngineStats()
        self._collector = Collector(tokenizer, eos_token_ids, self.stats)
        # Marks each step of the first replica in a profiler's trace; only set while one is taken.
        self.annotate_step: Callable[[Schedule], AbstractContextManager[object]] | None = None
        self._replica_of: dict[str, Replica] = {}  # by the ids of unfinished requests
        # Launching a program keeps a thread for 0.3 to 2 ms, most of it outside of Python: replicas do so side by side.
        self._launchers = ThreadPoolExecutor(len(replicas), "launch") if len(replicas) > 1 else None
        self._undelivered: list[RequestOutput] = []  # of steps that Ctrl-C ended
        self._failure: Exception | None = None
        self._closed = False
        self._stay_at_exit = close_at_exit(self)

    @property
    def has_unfinished(self) -> bool:
        """Whether a request waits or runs, or an output was not delivered."""
        return bool(self._undelivered) or any(replica.scheduler.has_unfinished for replica in self.replicas)

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
        try:
            priority = operator.index(priority)
        except TypeError:
            message = f"priority is {priority!r}; it must be an integer."
            raise RequestError(message, param="priority") from None
        parsed = parse_prompt(prompt, self.tokenizer, self._vocab_size)
        self._check_logprobs(params)
        words = bad_word_ids(params.bad_words or (), self.tokenizer)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        requests = [
            Request(
                request_id,
                parsed.token_ids,
                params,
                sample_index=index,
                priority=priority,
                cache_salt=parsed.cache_salt,
                # The first sample computes the prompt's log-probabilities for all.
                skip_prefix_cache_read=params.prompt_logprobs is not None and index == 0,
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
        self.replicas[0].scheduler.check(requests[0])
        return PreparedRequest(request_id, requests, parsed.text, stream, arrival_time)

    def enqueue(self, prepared: PreparedRequest) -> Replica:
        """The second half of `add_request`: queue it for the next step of the replica that is returned.

        Raises:
            RequestError: if its id is in use.
            DeviceError: if the engine failed or was closed.
        """
        self._check_alive()
        if prepared.request_id in self._collector:
            message = f"The request id {prepared.request_id!r} is in use; give each request its own id."
            raise RequestError(message, param="request_id")
        replica = choose_replica(self.replicas, prepared.samples[0])
        with deferred_interrupt():  # what one of these has and the other has not, could never be ended
            # Before the scheduler: the text of the prompt's end is the tokenizer's work, which may raise.
            self._collector.add(
                prepared.samples, prepared.text, stream=prepared.stream, arrival_time=prepared.arrival_time
            )
            self._replica_of[prepared.request_id] = replica
            try:
                for request in prepared.samples:
                    replica.scheduler.add(request)
                    if request.plan.bad_words:
                        replica.lockstep.add(request)
            except BaseException:
                self.abort(prepared.request_id)
                raise
        return replica

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request; returns what it has got so far, None for unknown ids."""
        if request_id not in self._collector:
            return None
        return self._end(request_id, "abort")

    def abandon(self, request_ids: Iterable[str]) -> None:
        """End requests without an output, and read what is in flight: nothing of them is left."""
        if self._closed:
            return  # perhaps at Python's end, when a generator that was left is closed
        with deferred_interrupt():
            for request_id in request_ids:
                self.abort(request_id)
            self.drain()
            self._undelivered.clear()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes of every replica; False, and nothing happens, while a request runs."""
        if any(replica.scheduler.num_running for replica in self.replicas):
            return False
        return all(replica.scheduler.reset_prefix_cache() for replica in self.replicas)

    def update_gauges(self) -> EngineStats:
        """Bring the figures up to date that are not counted as they happen, and return all; replicas are summed."""
        stats, schedulers = self.stats, [replica.scheduler for replica in self.replicas]
        managers = [scheduler.block_manager for scheduler in schedulers]
        stats.num_running = sum(scheduler.num_running for scheduler in schedulers)
        stats.num_waiting = sum(scheduler.num_waiting for scheduler in schedulers)
        num_free, num_blocks = sum(m.num_free_blocks for m in managers), sum(m.num_blocks for m in managers)
        stats.cache_usage = 1 - num_free / num_blocks
        stats.num_queried_tokens = sum(m.num_queried_tokens for m in managers)
        stats.num_hit_tokens = sum(m.num_hit_tokens for m in managers)
        stats.num_preemptions = sum(scheduler.num_preemptions for scheduler in schedulers)
        return stats

    def step(self, *, wait: bool = True) -> list[RequestOutput]:
        """Dispatch the next step of each replica that has none waiting, and read those that are done.

        Args:
            wait: for the first one, if all replicas that work have a step waiting behind the one that runs.

        Returns:
            Outputs of requests that finished, and of those that stream and got tokens.

        Raises:
            DeviceError: if a device fails; every request ends and the engine is of no more use.
            KeyboardInterrupt: after the step, if Ctrl-C came during it, since the device state it hands on would
                be lost in its middle. The next step returns this one's outputs too. At once while the step's programs
                compile; and when it comes again while the step waits for a device, which fails the engine.
        """
        self._check_alive()
        with deferred_interrupt():
            started = self._dispatch()
            working = [replica for replica in self.replicas if replica.in_flight]
            due = [replica for replica in working if len(replica.in_flight) > 1 or replica not in started]
            if len(working) > 1 or not wait:
                due = self._wait_for_one(due) if wait and len(due) == len(working) else _those_done(due)
            for replica in due:
                self._undelivered += self._read(replica)
        outputs, self._undelivered = self._undelivered, []
        return outputs

    def _wait_for_one(self, replicas: Sequence[Replica]) -> list[Replica]:
        """Wait until the oldest step of one is done; returns all of which it is."""
        with self._patience():
            while not (done := _those_done(replicas)):
                time.sleep(_POLL_S)
        return done

    def wait(self) -> None:
        """Until the devices have done what was dispatched; its tokens stay for the next `step`."""
        for replica in self.replicas:
            for step in replica.in_flight:
                step.tokens.block_until_ready()

    def drain(self) -> None:
        """Read what is in flight; nothing of aborted requests is left on the devices."""
        if self._failure is None and not self._closed:
            with deferred_interrupt():
                for replica in self.replicas:
                    while replica.in_flight:
                        self._read(replica)

    def close(self) -> None:
        """End all requests and give the device memory back, whatever goes wrong.

        Raises:
            DeviceError: if a device failed in a step that was in flight; all is given back nevertheless.
        """
        if self._closed:
            return
        self._stay_at_exit()
        with ExitStack() as closing:  # the last one first, each even if another fails
            closing.callback(gc.unfreeze)  # what the start froze may be collected, should another engine follow
            for replica in self.replicas:
                closing.callback(replica.runner.close)
                closing.callback(replica.in_flight.clear)
            if self._launchers:
                closing.callback(self._launchers.shutdown)
            try:
                self.drain()
            finally:
                self._closed = True

    def _dispatch(self) -> set[Replica]:
        """Dispatch a step of each replica that may start one; returns those that did."""
        scheduled = {replica: schedule for replica in self.replicas if (schedule := replica.next_schedule())}
        if any(replica.compile for replica in scheduled):
            self._compile(scheduled)
        now = time.time()
        run = self._launchers.map if self._launchers and len(scheduled) > 1 else map
        for error in list(run(self._launch, scheduled, scheduled.values())):
            if error is not None:
                raise self._fail(error) from error
        for schedule in scheduled.values():
            if not schedule.is_decode:
                self._note_admissions(schedule, now)
        return set(scheduled)

    def _compile(self, scheduled: Mapping[Replica, Schedule]) -> None:
        """Have the programs of these steps. Ctrl-C need not wait for that: the steps are taken back."""
        try:
            with held_interrupts(0):
                for replica, schedule in scheduled.items():
                    if replica.compile:
                        replica.compile(schedule)
        except Exception as error:
            for replica, schedule in scheduled.items():
                replica.scheduler.on_step_failed(schedule)
            raise self._fail(error) from error
        except BaseException:
            for replica, schedule in scheduled.items():
                replica.scheduler.retract(schedule)
            raise

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """While it waits for a device, which may hang: a second Ctrl-C ends that, and the engine."""
        try:
            with held_interrupts(1):
                yield
        except Exception:
            raise
        except BaseException:
            self._failure = DeviceError("Ctrl-C came twice while it waited for a device")
            raise

    def _launch(self, replica: Replica, schedule: Schedule) -> Exception | None:
        """Dispatch one step; in a thread of its own where several replicas start one."""
        mark = self.annotate_step if replica is self.replicas[0] else None
        try:
            with mark(schedule) if mark else nullcontext():
                replica.dispatch(schedule)
        except Exception as error:
            replica.scheduler.on_step_failed(schedule)
            return error
        return None

    def _note_admissions(self, schedule: Schedule, now: float) -> None:
        for sequence in schedule.sequences:
            if sequence.is_admitted:
                self._collector.on_scheduled(sequence.request, now)
                if sequence.request.num_preemptions == 0:
                    self.stats.num_prompt_tokens += sequence.request.num_prompt_tokens

    def _read(self, replica: Replica) -> list[RequestOutput]:
        """Take the tokens of a replica's oldest step in flight, waiting for them if need be."""
        step = replica.in_flight.popleft()
        try:
            with self._patience():
                result = replica.runner.read(step)
        except Exception as error:
            raise self._fail(error) from error
        now, outputs, is_suspect = time.time(), [], False
        touched: dict[str, None] = {}  # requests that may have something to report
        logprobs = result.logprobs or itertools.repeat(None)
        take, pass_on, prompt_logprobs = self._collector.on_tokens, replica.scheduler.on_tokens, result.prompt_logprobs
        # Once a row and step: 2,048 rows every 25 ms, with eight replicas.
        for sequence, tokens, its_logprobs in zip(step.schedule.sequences, result.tokens, logprobs, strict=False):
            request = sequence.request
            if request.status is RequestStatus.FINISHED:
                continue  # it ended while this step was in flight
            try:
                if prompt_logprobs:
                    self._take_prompt_logprobs(sequence, result)
                if not tokens:
                    continue  # a chunk before the prompt's end
                num_taken, reason, report = take(request, tokens, its_logprobs, now)
                pass_on(request, tokens if num_taken == len(tokens) else tokens[:num_taken])
                if report:
                    touched[request.request_id] = None
                    if reason:
                        if reason == "error":
                            is_suspect = True
                            replica.scheduler.distrust(request)
                        replica.scheduler.finish(request)
                        replica.lockstep.discard(request)
            except Exception:
                touched.pop(request.request_id, None)
                outputs.append(self._give_up(request.request_id))
        if is_suspect:
            self._check_sums(replica)
        self._collector.end_step(now)
        for request_id in touched:
            try:
                outputs.append(self._take_output(request_id, now))
            except Exception:
                outputs.append(self._give_up(request_id))
        return [output for output in outputs if output is not None]

    def _check_sums(self, replica: Replica) -> None:
        """Whether logits are not finite because the replica's shards do not add any more: all requests would end so."""
        try:
            replica.runner.check_sums()
        except DeviceError as error:
            self._failure = error
            raise

    def _take_prompt_logprobs(self, sequence: ScheduledSequence, result: StepResult) -> None:
        request = sequence.request
        if request in result.prompt_logprobs:
            self._collector.on_prompt_logprobs(request, sequence.start, result.prompt_logprobs[request])

    def _give_up(self, request_id: str) -> RequestOutput | None:
        """End a request whose tokens could not be taken: what is wrong with it must not end the others."""
        logger.exception("request %s ends with an error; the others go on", request_id)
        return self._end(request_id, "error")

    def _end(self, request_id: str, reason: FinishReason) -> RequestOutput | None:
        replica = self._replica_of[request_id]
        for request in replica.scheduler.abort(request_id):
            replica.lockstep.discard(request)
        self._collector.end(request_id, reason)
        try:
            return self._take_output(request_id, time.time())
        except Exception:
            if reason == "error":
                raise
            return self._give_up(request_id)

    def _take_output(self, request_id: str, now: float) -> RequestOutput | None:
        output = self._collector.take_output(request_id, now)
        if output is not None and output.finished:
            del self._replica_of[request_id]
        return output

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


def _those_done(replicas: Iterable[Replica]) -> list[Replica]:
    return [replica for replica in replicas if replica.in_flight[0].is_ready]


def close_at_exit(owner: Any) -> Callable[[], None]:
    """Have `owner` closed when Python ends, if it still lives; call what is returned once that is not needed.

    Python would end under steps that are in flight, or under a thread that is inside of JAX, which then aborts the
    process. JAX's own handlers came before, so they run after this one.
    """
    handler = partial(_close, weakref.ref(owner))
    atexit.register(handler)
    return partial(atexit.unregister, handler)


def _close(reference: weakref.ref[Any]) -> None:
    owner = reference()
    if owner is not None:
        owner.close()
