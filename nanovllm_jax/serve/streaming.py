"""Server-sent events, and noticing that a client has left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanovllm_jax.errors import DeviceError, RequestError
from nanovllm_jax.serve.errors import APIError, from_engine
from nanovllm_jax.serve.replies import Reply

# One encoder for all events: json.dumps would make one for each.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
CLIENT_LEFT = 499  # nginx's; nobody reads it


async def unless_client_leaves[T](receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`; None, and `work` is cancelled, if the client leaves first."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for other in (task, watch):
            other.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def answer(request: Request, work: Awaitable[Response]) -> Response:
    """The response that `work` makes, unless the client leaves."""
    response = await unless_client_leaves(request.receive, work)
    return Response(status_code=CLIENT_LEFT) if response is None else response


class EventStream(Response):
    """Sends each chunk of a reply as one server-sent event, then `[DONE]`; closes the reply when the client leaves."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.headers["Content-Type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self._send(send))
        finally:
            self._reply.close()

    async def _send(self, send: Send) -> None:
        async def write(data: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        async with aclosing(self._reply.chunks()) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in events:
                    await write(_encode(event))
            except APIError as error:  # the status is sent: what is left is to say it in the stream
                await write(json.dumps(error.body()))
            except (RequestError, DeviceError) as error:
                await write(json.dumps(from_engine(error).body()))
            await write("[DONE]", more=False)
