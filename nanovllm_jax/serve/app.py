"""The ASGI application: every endpoint over one `AsyncLLM`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from nanovllm_jax import __version__
from nanovllm_jax.async_llm import AsyncLLM
from nanovllm_jax.errors import DeviceError
from nanovllm_jax.serve import metrics
from nanovllm_jax.serve.config import ServeConfig
from nanovllm_jax.serve.errors import APIError, from_engine, install_handlers
from nanovllm_jax.serve.generation import check_model, open_reply
from nanovllm_jax.serve.guards import LimitBody, RequireKey
from nanovllm_jax.serve.page import add_page
from nanovllm_jax.serve.protocol import ChatBody, CompletionBody, DetokenizeBody, ErrorBody, SamplingBody, TokenizeBody
from nanovllm_jax.serve.streaming import EventStream, answer

_WHOLE_OR_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "Whole, or as a stream."}
}


def build_app(llm: AsyncLLM, config: ServeConfig) -> FastAPI:
    """Make the application; it neither opens nor closes `llm`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        task = asyncio.create_task(metrics.log_throughput(llm.stats))
        yield
        task.cancel()

    app = FastAPI(
        title="nanovllm-jax",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    install_handlers(app)
    app.add_middleware(partial(LimitBody, limit=config.max_body_size))
    app.add_middleware(partial(RequireKey, keys=config.api_keys))
    _add_generation(app, llm, config)
    _add_models(app, llm, config)
    _add_tokens(app, llm, config)
    _add_operations(app, llm, config)
    add_page(app)
    return app


def _add_generation(app: FastAPI, llm: AsyncLLM, config: ServeConfig) -> None:
    async def respond(body: SamplingBody, request: Request) -> Response:
        reply = await open_reply(llm, config, body, getattr(request.state, "key", None))
        if body.stream:
            return EventStream(reply)
        try:
            return JSONResponse(await reply.whole())
        finally:
            reply.close()

    @app.post("/v1/completions", response_class=Response, responses=_WHOLE_OR_STREAM)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one prompt or several."""
        return await answer(request, respond(body, request))

    @app.post("/v1/chat/completions", response_class=Response, responses=_WHOLE_OR_STREAM)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await answer(request, respond(body, request))


def _add_models(app: FastAPI, llm: AsyncLLM, config: ServeConfig) -> None:
    card = {
        "id": config.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "nanovllm-jax",
        "max_model_len": llm.max_model_len,
        "vocab_size": llm.model_config.vocab_size,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """One model."""
        check_model(config, model)
        return card


def _add_tokens(app: FastAPI, llm: AsyncLLM, config: ServeConfig) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Token ids of a prompt or a conversation."""
        check_model(config, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise APIError(400, "Give either 'prompt' or 'messages'.", param="prompt")
        if body.messages is not None:
            messages = [message.plain() for message in body.messages]
            tokens = await llm.render_chat(messages, add_generation_prompt=True)
        else:
            tokens = await llm.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens)
        return {"count": len(tokens), "max_model_len": llm.max_model_len, "tokens": tokens}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        """The text of token ids."""
        check_model(config, body.model)
        return {"prompt": await llm.detokenize(body.tokens)}


def _add_operations(app: FastAPI, llm: AsyncLLM, config: ServeConfig) -> None:
    registry = metrics.registry(llm.stats, config.model_name)

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while the engine runs, 503 once it is dead."""
        try:
            await llm.check_health()
        except DeviceError as error:
            return from_engine(error).response()
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> JSONResponse:
        """Forget all cached prefixes; 409 while a request runs."""
        if not await llm.reset_prefix_cache():
            raise APIError(409, "A request runs; the prefix cache can be reset when none does.")
        return JSONResponse({"success": True})
