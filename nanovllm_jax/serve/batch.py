"""Runs a file of requests in OpenAI's batch format through `AsyncLLM`, without a socket.

The output is a line for each line of the input, in its order at the end. While the batch runs, lines are appended as
they finish, so an interrupted batch goes on from what the output holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanovllm_jax.async_llm import AsyncLLM
from nanovllm_jax.errors import ConfigError, DeviceError
from nanovllm_jax.serve.config import ServeConfig
from nanovllm_jax.serve.errors import APIError, from_validation
from nanovllm_jax.serve.generation import open_reply
from nanovllm_jax.serve.protocol import ChatBody, CompletionBody, SamplingBody

_BODIES: dict[str, type[SamplingBody]] = {"/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody}
_START = b'{"id":"batch_req_'  # of each line of the output
_SERVER_ERROR = 500  # from here on, doing it again may help


class BatchLine(BaseModel):
    """One line of the input."""

    model_config = ConfigDict(extra="forbid")
    custom_id: str = Field(min_length=1)
    method: str
    url: str
    body: dict[str, Any]


@dataclass
class BatchCounts:
    """What became of the lines: done before, answered now, and refused or failed now."""

    kept: int = 0
    answered: int = 0
    failed: int = 0


@dataclass
class _Output:
    """The output file: where the line for each line of the input stands in it."""

    file: IO[bytes]
    places: dict[int, tuple[int, int]] = field(default_factory=dict)  # input line -> offset, length

    def write(self, number: int, result: dict[str, Any]) -> None:
        """Append the result of an input line."""
        line = json.dumps(result, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self.places[number] = self.file.seek(0, os.SEEK_END), len(line)
        self.file.write(line)
        self.file.flush()


async def run_batch(
    llm: AsyncLLM, config: ServeConfig, source: Path, target: Path, on_line: Callable[[], None] = lambda: None
) -> BatchCounts:
    """Answer every line of `source` in `target`; lines that `target` holds already are not done again.

    Args:
        llm: the engine.
        config: the model's name, and what the server would check.
        source: lines of `{"custom_id", "method": "POST", "url", "body"}`.
        target: lines of `{"id", "custom_id", "response", "error"}`, in the order of `source`. A line that cannot be
            served has the error in its place; one that failed by the server's fault (status 500 and up) is done
            again the next time.
        on_line: called after each line.

    Raises:
        ConfigError: if `target` holds something else than a batch's output.
        DeviceError: if the engine fails; what was done is kept.
    """
    done = _read_done(target)
    counts = BatchCounts()
    rows = llm.config.max_num_seqs * llm.config.data_parallel_size
    slots = asyncio.Semaphore(2 * rows)  # the engine never waits for the next line
    with target.open("ab+") as file:
        output = _Output(file)
        async with _first_error(), asyncio.TaskGroup() as group:

            async def one(number: int, line: BatchLine) -> None:
                try:
                    result = await _answer(llm, config, line)
                finally:
                    slots.release()
                output.write(number, result)
                if result["response"]["status_code"] == 200:
                    counts.answered += 1
                else:
                    counts.failed += 1
                on_line()

            for number, line in _lines(source):
                if isinstance(line, BatchLine) and (place := done.pop(line.custom_id, None)):
                    output.places[number] = place
                    counts.kept += 1
                elif isinstance(line, BatchLine):
                    await slots.acquire()
                    group.create_task(one(number, line))
                    continue
                else:
                    output.write(number, line)
                    counts.failed += 1
                on_line()
        _sort(output, target)
    return counts


@asynccontextmanager
async def _first_error() -> AsyncGenerator[None]:
    """One error instead of a group: when the engine fails, every task fails of it."""
    try:
        yield
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def _lines(source: Path) -> Iterator[tuple[int, BatchLine | dict[str, Any]]]:
    """The input's lines with their numbers from 1: as requests, or as the output of what is none."""
    seen: dict[str, int] = {}
    with source.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = BatchLine.model_validate_json(text)
            except ValidationError as error:
                wrong = from_validation(error.errors(), "The line")
                yield number, _failed(None, APIError(400, f"Line {number}: {wrong.message}", param=wrong.param))
                continue
            earlier = seen.setdefault(line.custom_id, number)
            if earlier == number:
                yield number, line
            else:  # under no name: whoever looks for the name must find the first one's answer
                message = f"Line {number} has the custom_id {line.custom_id!r} of line {earlier}; give each its own."
                yield number, _failed(None, APIError(400, message, param="custom_id"))


async def _answer(llm: AsyncLLM, config: ServeConfig, line: BatchLine) -> dict[str, Any]:
    try:
        reply = await open_reply(llm, config, _body(line))
        try:
            return _result(line.custom_id, 200, await reply.whole())
        finally:
            reply.close()
    except APIError as error:
        if isinstance(error.__cause__, DeviceError):
            raise error.__cause__ from None
        return _failed(line.custom_id, error)


def _body(line: BatchLine) -> SamplingBody:
    kind = _BODIES.get(line.url)
    if line.method != "POST" or kind is None:
        asked = f"{line.method} {line.url}"
        raise APIError(404, f"{asked} cannot be in a batch; POST {' or '.join(_BODIES)} can.", param="url")
    try:
        body = kind.model_validate(line.body)
    except ValidationError as error:
        raise from_validation(error.errors(), "The body") from error
    if body.stream:
        raise APIError(400, "stream is true; a batch has whole answers: leave it out.", param="stream")
    return body


def _failed(custom_id: str | None, error: APIError) -> dict[str, Any]:
    return _result(custom_id, error.status, error.body())


def _result(custom_id: str | None, status: int, body: dict[str, Any]) -> dict[str, Any]:
    name = uuid.uuid4().hex
    response = {"status_code": status, "request_id": f"req-{name}", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": None}


def _read_done(target: Path) -> dict[str, tuple[int, int]]:
    """Offset and length of each line of an earlier output that stands; a torn last line is cut off.

    Lines without a custom_id are of inputs that could not be read: they are reported again.
    """
    done: dict[str, tuple[int, int]] = {}
    if not target.exists():
        return done
    with target.open("rb+") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and line[: len(_START)] == _START[: len(line)]:
                file.truncate(offset)
                break
            try:
                result = json.loads(line)
                name, status = result["custom_id"], result["response"]["status_code"]
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(
                    f"Line {number} of {target} is no line of a batch's output ({error!r}); give another file, or "
                    "remove that line."
                ) from error
            if name is not None and status < _SERVER_ERROR:
                done[name] = offset, len(line)
            offset += len(line)
    return done


def _sort(output: _Output, target: Path) -> None:
    """Bring the output into the input's order, by a file that takes its place as a whole."""
    part = target.with_name(target.name + ".sorted")
    with part.open("wb") as file:
        for _, (offset, length) in sorted(output.places.items()):
            output.file.seek(offset)
            file.write(output.file.read(length))
    part.replace(target)
