"""ASGI middleware: API keys and the body's limit, before anything reads the request."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm_jax.serve.errors import APIError

_OPEN_PATHS = frozenset({"/", "/health", "/version", "/metrics"})
_OPEN_FOLDER = "/static/"  # the page's files; it asks for the key itself


def matching_key(header: bytes, keys: Sequence[str]) -> str | None:
    """The one of `keys` that an `Authorization: Bearer` header brings. Takes the same time wherever they differ."""
    scheme, _, given = header.partition(b" ")
    if scheme.lower() != b"bearer":  # in either case, RFC 9110, section 11.1
        return None
    found = None
    for key in keys:
        if hmac.compare_digest(given, key.encode()):
            found = key
    return found


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)


class RequireKey:
    """Answers 401 unless the request brings one of `keys`; `scope["state"]["key"]` is then that one."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app, self._keys = app, list(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and not _is_open(scope["path"]):
            key = matching_key(dict(scope["headers"]).get(b"authorization", b""), self._keys)
            if key is None:
                message = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
                error = APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await error.response()(scope, receive, send)
                return
            scope.setdefault("state", {})["key"] = key
        await self._app(scope, receive, send)


class LimitBody:
    """Answers 413 when a body is longer than `limit` bytes, without keeping more than that of it."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = bytearray(), not stated.isdigit() or int(stated) <= self._limit
        while more and len(body) <= self._limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > self._limit or (stated.isdigit() and int(stated) > self._limit):
            text = f"The request body is larger than {self._limit} bytes; send less or raise --max-body-size."
            await APIError(413, text, headers={"Connection": "close"}).response()(scope, receive, send)
            return
        first: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self._app(scope, replay, send)
