"""Errors as OpenAI's clients expect them: a status code and one body, with the parameter named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from nanovllm_jax.errors import DeviceError, RequestError

_TYPES = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "server_error"}


class APIError(Exception):
    """An error with its HTTP status; `param` is the field of the request that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def from_engine(error: RequestError | DeviceError, fields: Mapping[str, str] = MappingProxyType({})) -> APIError:
    """An engine's error as the server's; `fields` has the names that a request's body uses for the engine's."""
    if isinstance(error, DeviceError):
        return APIError(503, str(error), code="engine_dead")
    return APIError(400, str(error), param=error.param and fields.get(error.param, error.param))


def install_handlers(app: FastAPI) -> None:
    """Give every error of `app` OpenAI's body."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, APIError):
            return error.response()
        if isinstance(error, RequestError | DeviceError):
            return from_engine(error).response()
        if isinstance(error, RequestValidationError):
            return from_validation([_without_source(one) for one in error.errors()], "The body").response()
        if isinstance(error, HTTPException):
            return APIError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()
        return APIError(500, f"{type(error).__name__} in the server; its log has the traceback.").response()

    for kind in (APIError, RequestError, DeviceError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, on_api_error)


def from_validation(errors: Sequence[Any], whole: str) -> APIError:
    """The first of pydantic's errors; `whole` names what they are about where no field is to blame."""
    first = errors[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return APIError(400, f"{whole} is no valid JSON: {first.get('ctx', {}).get('error', first['msg'])}.")
    param = path[0] if path else None
    if first["type"] == "extra_forbidden":
        return APIError(400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    where = ".".join(part for part in path if part.isidentifier() or part.isdigit()) or whole
    code = "unsupported_parameter" if first["type"] == "unsupported" else None
    return APIError(400, f"{where}: {first['msg']}", param=param, code=code)


def _without_source(error: Any) -> Any:
    """FastAPI's paths start with where the field was found: body, query or path."""
    return {**error, "loc": error["loc"][1:]}
