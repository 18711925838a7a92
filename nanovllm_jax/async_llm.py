"""`AsyncLLM`: one model for many asyncio tasks, each with its own stream of outputs.

async def main():
    async with AsyncLLM() as llm:
        async for output in llm.generate("To be, or", SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

asyncio.run(main())
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Literal

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.build import build_engine
from nanovllm_jax.engine.engine_thread import EngineThread, Event
from nanovllm_jax.engine.inputs import Prompt, check_text, render_chat
from nanovllm_jax.engine.stats import EngineStats
from nanovllm_jax.errors import RequestError
from nanovllm_jax.outputs import RequestOutput
from nanovllm_jax.sampling_params import SamplingParams


class AsyncLLM:
    """A language model whose engine runs in a thread, for many requests at once from asyncio.

    Args:
        model: as of `LLM`.
        tokenizer: as of `LLM`.
        skip_tokenizer_init: as of `LLM`.
        batching: as of `LLM`; "mixed" keeps the time between tokens even while prompts arrive.
        **engine_args: the other arguments of `LLM`.

    Raises:
        ConfigError, WeightsError, DeviceError: as `LLM`.
        TypeError: for an argument that does not exist.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        batching: Literal["prefill_first", "mixed"] = "mixed",
        **engine_args: Any,
    ) -> None:
        self.config = EngineConfig(batching=batching, **engine_args)
        built = build_engine(
            None if model is None else str(model), tokenizer, self.config, skip_tokenizer=skip_tokenizer_init
        )
        self.model_config, self._defaults = built.model_config, built.defaults
        self.max_model_len = built.shape.max_model_len
        self._engine = built.engine
        self._ids = itertools.count()
        # By the engine's ids. It has ids of its own, since the caller may use one again before the engine knows that
        # its request was left.
        self._streams: dict[str, RequestStream] = {}
        self._engine_ids: dict[str, str] = {}  # by the caller's ids
        self._num_unfinished, self._counting = 0, threading.Lock()  # event loops of several threads may use it
        # One thread: a tokenizer uses several for a batch, but some are not safe to share. It is not the event
        # loop's and not the engine's, so a long prompt holds neither up.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._thread = EngineThread(self._engine, self._on_events)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        stream: bool = True,
    ) -> AsyncGenerator[RequestOutput]:
        """Continue one prompt, yielding its output as it grows; the last one is finished.

        Each output holds everything so far; a slow reader skips some. A cancelled task, and one that leaves the
        loop (at once with `contextlib.aclosing`), ends the request.

        Args:
            prompt: as of `LLM.generate`.
            sampling_params: None takes the model's defaults.
            request_id: unique among unfinished requests; None makes one.
            priority: smaller is served first, with scheduling_policy="priority".
            stream: False yields only the finished output, which costs the engine less.

        Raises:
            RequestError: if the prompt or the parameters cannot be served.
            DeviceError: if the engine fails or is closed.
        """
        outputs = await self.add_request(prompt, sampling_params, request_id, priority=priority, stream=stream)
        try:
            async for output in outputs:
                yield output
        finally:
            outputs.close()

    async def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        stream: bool = True,
    ) -> RequestStream:
        """`generate` in two steps: returns when the request is checked, to be queued before the next step.

        Iterate over the result, then close it.

        Raises:
            RequestError: if the prompt or the parameters cannot be served.
            DeviceError: if the engine failed or is closed.
        """
        await self.check_health()
        params = sampling_params or self.get_default_sampling_params()
        engine_id = f"{'async' if request_id is None else request_id}-{next(self._ids)}"
        request_id = engine_id if request_id is None else request_id
        if request_id in self._engine_ids:
            message = f"The request id {request_id!r} is in use; give each request its own id."
            raise RequestError(message, param="request_id")
        outputs = self._streams[engine_id] = RequestStream(self, request_id, engine_id, params.n)
        self._engine_ids[request_id] = engine_id
        self._count(params.n)
        try:
            prepare = partial(self._engine.prepare, engine_id, prompt, params, priority=priority, stream=stream)
            # Token ids are checked faster than a thread is woken.
            ready = not params.bad_words and not _is_text(prompt)
            prepared = await self._in_tokenizer_thread(prepare) if not ready else prepare()
            outputs.prompt_token_ids = prepared.samples[0].prompt_token_ids
            self._thread.add(prepared)
            if outputs.aborted:  # while it was tokenised, when the engine did not know it yet
                self._thread.abort(engine_id)
        except BaseException:
            outputs.close()
            raise
        return outputs

    async def abort(self, request_id: str) -> None:
        """End a request; its stream ends with what it has got, finish_reason "abort". Unknown ids are ignored."""
        outputs = self._streams.get(self._engine_ids.get(request_id, ""))
        if outputs is not None:
            outputs.aborted = True
            self._thread.abort(outputs.engine_id)

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing happens, while a request runs."""
        return await asyncio.wrap_future(self._thread.call(self._engine.reset_prefix_cache))

    async def check_health(self) -> None:
        """Return if the engine runs.

        Raises:
            DeviceError: if it failed or was closed.
        """
        if self._thread.error is not None:
            raise self._thread.error

    @property
    def stats(self) -> EngineStats:
        """What the engine counted until its last step."""
        return self._engine.stats

    @property
    def num_unfinished(self) -> int:
        """Samples that were asked for and have not ended."""
        return self._num_unfinished

    async def render_chat(self, messages: Sequence[Mapping[str, Any]], **template_args: Any) -> list[int]:
        """As of `LLM`, in the tokenizer's thread."""
        return await self._in_tokenizer_thread(partial(render_chat, self.get_tokenizer(), messages, **template_args))

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, in the tokenizer's thread.

        Raises:
            RequestError: if it is no valid Unicode text.
        """
        check_text(text, "prompt")
        encode = partial(self.get_tokenizer(), text, add_special_tokens=add_special_tokens)
        return list((await self._in_tokenizer_thread(encode)).input_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, in the tokenizer's thread.

        Raises:
            RequestError: for ids outside the vocabulary.
        """
        size = self.model_config.vocab_size
        wrong = next((token for token in token_ids if not 0 <= token < size), None)
        if wrong is not None:
            raise RequestError(f"tokens holds the id {wrong}; ids go from 0 to {size - 1}.", param="tokens")
        return await self._in_tokenizer_thread(partial(self.get_tokenizer().decode, token_ids))

    def get_tokenizer(self) -> Any:
        """As of `LLM`."""
        if self._engine.tokenizer is None:
            raise RequestError("There is no tokenizer (skip_tokenizer_init=True); make the AsyncLLM without it.")
        return self._engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """As of `LLM`."""
        return self._defaults.sampling_params()

    def close(self) -> None:
        """End all requests after the step that runs, and give the device memory back."""
        self._thread.close()
        self._tokenizing.shutdown(cancel_futures=True)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _on_events(self, events: list[Event]) -> None:
        """Called in the engine's thread: hand each event to the loop that waits for it, once a step and loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, RequestOutput | Exception]]] = {}
        for engine_id, event in events:
            outputs = self._streams.get(engine_id)
            if outputs is not None:
                if isinstance(event, RequestOutput):
                    event.request_id = outputs.request_id
                by_loop.setdefault(outputs.loop, []).append((outputs, event))
        for loop, pairs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, pairs)
            except RuntimeError:  # the loop was closed: nobody waits
                for outputs, _ in pairs:
                    self._leave(outputs)  # `close` would wake who waits, through the closed loop

    async def _in_tokenizer_thread[T](self, function: Callable[[], T]) -> T:
        await self.check_health()
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function)

    def _leave(self, outputs: RequestStream) -> None:
        if self._streams.pop(outputs.engine_id, None) is not None:
            del self._engine_ids[outputs.request_id]
            self._count(-outputs.num_samples)
            self._thread.abort(outputs.engine_id)

    def _count(self, num_samples: int) -> None:
        with self._counting:
            self._num_unfinished += num_samples


class RequestStream:
    """The outputs of one request, as they come. `close` ends it; what was not read yet is replaced by newer ones."""

    def __init__(self, llm: AsyncLLM, request_id: str, engine_id: str, num_samples: int) -> None:
        self.request_id, self.engine_id, self.num_samples = request_id, engine_id, num_samples
        self.prompt_token_ids: list[int] = []
        self.aborted = False
        self.loop = asyncio.get_running_loop()
        self._llm = llm
        self._latest: RequestOutput | Exception | None = None
        self._news = asyncio.Event()
        self._ended = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        await self._news.wait()
        self._news.clear()
        latest, self._latest = self._latest, None
        if not isinstance(latest, RequestOutput) or latest.finished:
            self.close()
        if isinstance(latest, Exception):
            raise latest
        if latest is None:  # closed while it waited
            raise StopAsyncIteration
        return latest

    def deliver(self, event: RequestOutput | Exception) -> None:
        """Take an output or the error that ends it all; in the event loop."""
        self._latest = event
        self._news.set()

    def close(self) -> None:
        """End the request if it has not ended."""
        self._ended = True
        self._news.set()
        self._llm._leave(self)


def _is_text(prompt: Prompt) -> bool:
    return isinstance(prompt, str) or (isinstance(prompt, Mapping) and "prompt" in prompt)


def _deliver(pairs: list[tuple[RequestStream, RequestOutput | Exception]]) -> None:
    for outputs, event in pairs:
        outputs.deliver(event)
