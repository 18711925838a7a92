"""From outputs of the engine to OpenAI's objects, whole or in chunks."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm_jax.async_llm import RequestStream
from nanovllm_jax.errors import DeviceError
from nanovllm_jax.outputs import CompletionOutput, RequestOutput
from nanovllm_jax.serve.errors import APIError, from_engine
from nanovllm_jax.serve.logprobs import chat_logprobs, completion_logprobs


@dataclass
class Reply:
    """One answer: the prompts' streams, and how to write what comes.

    Attributes:
        model: the name to report.
        is_chat: chat completion or text completion.
        streams: one a prompt.
        n: samples a prompt.
        top_logprobs: log-probabilities a token; None for none.
        include_usage: whether a stream ends with the usage.
    """

    model: str
    is_chat: bool
    streams: Sequence[RequestStream]
    n: int
    top_logprobs: int | None
    include_usage: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, Any]:
        """The response of a request without `stream`.

        Raises:
            APIError: if a sample ended with an error, or the engine failed.
        """
        try:
            outputs = await asyncio.gather(*(_last(stream) for stream in self.streams))
        except DeviceError as error:
            raise from_engine(error) from error
        choices = [
            self._choice(prompt * self.n + sample.index, sample)
            for prompt, output in enumerate(outputs)
            for sample in output.outputs
        ]
        return {**self._head(chunk=False), "choices": choices, "usage": _usage(outputs)}

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """The events of a request with `stream`.

        Raises:
            APIError: if a sample ended with an error.
            DeviceError: if the engine failed.
        """
        head = self._head(chunk=True) | ({"usage": None} if self.include_usage else {})
        if self.is_chat:
            for index in range(self.n):
                delta = {"role": "assistant", "content": ""}
                yield {**head, "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]}
        sent: dict[int, CompletionOutput] = {}
        last: dict[int, RequestOutput] = {}
        async for prompt, output in _merge(self.streams):
            last[prompt] = output
            for sample in output.outputs:
                index = prompt * self.n + sample.index
                choice = self._delta(index, sample, sent.get(index))
                sent[index] = sample
                if choice is not None:
                    yield {**head, "choices": [choice]}
        if self.include_usage:
            yield {**head, "choices": [], "usage": _usage([last[prompt] for prompt in sorted(last)])}

    def close(self) -> None:
        """End what has not ended."""
        for stream in self.streams:
            stream.close()

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion" + ".chunk" * chunk) if self.is_chat else "text_completion"
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, sample: CompletionOutput) -> dict[str, Any]:
        _check(sample)
        logprobs = self._logprobs(sample, 0, "")
        if self.is_chat:
            text: dict[str, Any] = {"message": {"role": "assistant", "content": sample.text, "refusal": None}}
        else:
            text = {"text": sample.text}
        return {"index": index, **text, "logprobs": logprobs, **_end(sample)}

    def _delta(self, index: int, sample: CompletionOutput, before: CompletionOutput | None) -> dict[str, Any] | None:
        """What is new since `before`; None if nothing is."""
        _check(sample)
        if before is not None and before.finish_reason is not None:
            return None
        old_text, old_length = (before.text, len(before.token_ids)) if before else ("", 0)
        new = sample.text[len(old_text) :]
        logprobs = self._logprobs(sample, old_length, old_text)
        if not new and logprobs is None and sample.finish_reason is None:
            return None
        text: dict[str, Any] = {"delta": {"content": new} if new else {}} if self.is_chat else {"text": new}
        return {"index": index, **text, "logprobs": logprobs, **_end(sample)}

    def _logprobs(self, sample: CompletionOutput, start: int, text: str) -> dict[str, Any] | None:
        if self.top_logprobs is None or not sample.logprobs or start == len(sample.logprobs):
            return None
        entries = sample.logprobs[start:]
        if self.is_chat:
            return chat_logprobs(entries, self.top_logprobs)
        return completion_logprobs(entries, self.top_logprobs, len(text))


async def _last(stream: RequestStream) -> RequestOutput:
    async for output in stream:
        if output.finished:
            return output
    raise APIError(500, "The request was aborted.")


async def _merge(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """Outputs of all streams as they come, with the stream's index."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    news: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue()

    async def pump(index: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                news.put_nowait((index, output))
        except Exception as error:
            news.put_nowait(error)
        news.put_nowait(None)

    tasks = [asyncio.create_task(pump(*pair)) for pair in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            event = await news.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                running -= 1
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()


def _check(sample: CompletionOutput) -> None:
    if sample.finish_reason == "error":
        raise APIError(500, "The engine could not finish this request; its log says why.", code="request_failed")


def _end(sample: CompletionOutput) -> dict[str, Any]:
    return {"finish_reason": sample.finish_reason, "stop_reason": sample.stop_reason}


def _usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
