"""One streamed completion over HTTP, with the time of each piece of it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from nanovllm_jax.errors import NanoVLLMError

_TEMPERATURE = 0.6  # of the throughput benchmark


@dataclass(frozen=True)
class Target:
    """A server and how to ask it.

    Attributes:
        url: of the server, with or without `/v1`.
        model: the name it has there.
        key: API key; None sends none.
        ignore_eos: ask for outputs of full length by vLLM's field, which OpenAI's own servers do not know.
    """

    url: str
    model: str
    key: str | None = None
    ignore_eos: bool = True

    @property
    def root(self) -> str:
        """The address that `/v1/completions` is added to."""
        return root_of(self.url)

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return headers(self.key)

    def body(self, prompt: list[int] | str, max_tokens: int) -> dict[str, Any]:
        """Of one request to `/v1/completions`."""
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": _TEMPERATURE,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }


@dataclass
class Outcome:
    """What became of one request. Times are in s of `time.perf_counter`.

    Attributes:
        sent: the request was sent.
        arrivals: each event with new text arrived; a server may put several tokens into one.
        num_prompt_tokens: as the server counted them.
        num_output_tokens: as the server counted them.
        error: why it failed; None if it did not.
    """

    sent: float
    arrivals: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Time to the first token, s."""
        return self.arrivals[0] - self.sent

    @property
    def e2e(self) -> float:
        """Time to the last token, s."""
        return self.arrivals[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, s; None of a single token."""
        if self.num_output_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.num_output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        """Times between one event and the next, s."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


def root_of(url: str) -> str:
    """A server's address without `/v1`."""
    return url.rstrip("/").removesuffix("/v1")


def headers(key: str | None) -> dict[str, str]:
    """The header that brings an API key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def open_session() -> aiohttp.ClientSession:
    """A client without limits of its own: neither on connections nor on time."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, sock_connect=30)
    )


async def complete(session: aiohttp.ClientSession, target: Target, prompt: list[int] | str, max_tokens: int) -> Outcome:
    """Send one request and read its stream to the end; what goes wrong is in the outcome."""
    outcome = Outcome(time.perf_counter())
    request = session.post(
        f"{target.root}/v1/completions", json=target.body(prompt, max_tokens), headers=target.headers
    )
    try:
        async with request as response:
            if response.status != 200:
                outcome.error = f"{response.status}: {(await response.text())[:500]}"
                return outcome
            async for data in _events(response.content):
                _take(outcome, json.loads(data))
    except (aiohttp.ClientError, json.JSONDecodeError, OSError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    if outcome.error is None and not (outcome.arrivals and outcome.num_output_tokens):
        outcome.error = "the stream brought no text or no usage; the server must know stream_options.include_usage"
    return outcome


async def fetch_json(session: aiohttp.ClientSession, url: str, key: str | None, body: Any = None) -> Any:
    """What a server answers to a GET, or to a POST if there is a body.

    Raises:
        NanoVLLMError: if it cannot be reached or answers with an error.
    """
    method = "GET" if body is None else "POST"
    try:
        async with session.request(method, url, json=body, headers=headers(key)) as response:
            if response.status != 200:
                raise NanoVLLMError(f"{url} answers {response.status}: {(await response.text())[:500]}")
            return await response.json()
    except (aiohttp.ClientError, OSError) as error:
        raise NanoVLLMError(f"{url} cannot be read: {error}. Is the server running there?") from error


async def _events(content: aiohttp.StreamReader) -> AsyncGenerator[bytes]:
    """Data of each server-sent event until `[DONE]`."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if data and line.startswith(b"data:"):
                yield data


def _take(outcome: Outcome, event: dict[str, Any]) -> None:
    if "error" in event:
        outcome.error = str(event["error"])
    if event.get("choices"):
        outcome.arrivals.append(time.perf_counter())
    if usage := event.get("usage"):
        outcome.num_prompt_tokens = usage["prompt_tokens"]
        outcome.num_output_tokens = usage["completion_tokens"]
