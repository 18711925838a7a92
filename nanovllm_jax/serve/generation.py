"""The two endpoints that generate: from a request's body to a `Reply`."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from nanovllm_jax.async_llm import AsyncLLM, RequestStream
from nanovllm_jax.engine.inputs import Prompt
from nanovllm_jax.errors import DeviceError, RequestError
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.serve.config import ServeConfig
from nanovllm_jax.serve.errors import APIError, from_engine
from nanovllm_jax.serve.protocol import ChatBody, CompletionBody, SamplingBody
from nanovllm_jax.serve.replies import Reply
from nanovllm_jax.serve.streaming import EventStream, answer

_OPENAI_MAX_TOKENS = 16  # of /v1/completions


def check_model(config: ServeConfig, model: str | None) -> None:
    """Refuse another model's name; none is this server's.

    Raises:
        APIError: 404.
    """
    if model is not None and model != config.model_name:
        message = f"The model {model!r} does not exist; this server has {config.model_name!r}."
        raise APIError(404, message, param="model", code="model_not_found")


def generation_routes(llm: AsyncLLM, config: ServeConfig) -> APIRouter:
    """`/v1/completions` and `/v1/chat/completions`."""
    router = APIRouter(prefix="/v1")

    @router.post("/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one prompt or several."""
        return await answer(request, _completions(llm, config, body, request))

    @router.post("/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await answer(request, _chat(llm, config, body, request))

    return router


async def _completions(llm: AsyncLLM, config: ServeConfig, body: CompletionBody, request: Request) -> Response:
    try:
        max_tokens = _OPENAI_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        params = body.sampling_params(llm.get_default_sampling_params(), max_tokens=max_tokens)
    except RequestError as error:
        raise from_engine(error) from error
    prompt = body.prompt
    many: Sequence[Any] = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    prompts = [{"prompt" if isinstance(one, str) else "prompt_token_ids": one} for one in many]
    return await _respond(llm, config, body, request, prompts, params, is_chat=False, top=body.logprobs)


async def _chat(llm: AsyncLLM, config: ServeConfig, body: ChatBody, request: Request) -> Response:
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    top = (body.top_logprobs or 0) if body.logprobs else None
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    fields = {"prompt": "messages", "logprobs": "top_logprobs", "max_tokens": name}
    try:
        params = body.sampling_params(llm.get_default_sampling_params(), max_tokens=getattr(body, name), logprobs=top)
        extra = body.chat_template_kwargs or {}
        messages = [message.plain() for message in body.messages]
        ids = await llm.render_chat(messages, add_generation_prompt=body.add_generation_prompt, **extra)
    except RequestError as error:
        raise from_engine(error, fields) from error
    prompts = [{"prompt_token_ids": ids}]
    return await _respond(llm, config, body, request, prompts, params, is_chat=True, top=top, fields=fields)


async def _respond(
    llm: AsyncLLM,
    config: ServeConfig,
    body: SamplingBody,
    request: Request,
    prompts: list[dict[str, Any]],
    params: SamplingParams,
    *,
    is_chat: bool,
    top: int | None,
    fields: dict[str, str] | None = None,
) -> Response:
    check_model(config, body.model)
    if body.stream_options is not None and not body.stream:
        raise APIError(400, "stream_options needs stream to be true.", param="stream_options")
    _check_queue(llm, config)
    salt = _salt(config, request, body.cache_salt)
    streams: list[RequestStream] = []
    usage = body.stream_options is not None and body.stream_options.include_usage
    reply = Reply(config.model_name, is_chat, streams, params.n, top, usage)
    try:
        for prompt in prompts:
            salted: Prompt = {**prompt, "cache_salt": salt} if salt else prompt  # pyright: ignore
            streams.append(await llm.add_request(salted, params, priority=body.priority, stream=body.stream))
            _check_length(llm, body, streams[-1], (fields or {}).get("max_tokens", "max_tokens"))
        if body.stream:
            return EventStream(_closing(reply))
        response = JSONResponse(await reply.whole())
    except (RequestError, DeviceError) as error:
        reply.close()
        raise from_engine(error, fields) from error
    except BaseException:
        reply.close()
        raise
    return response


async def _closing(reply: Reply) -> AsyncGenerator[dict[str, Any]]:
    try:
        async for chunk in reply.chunks():
            yield chunk
    finally:
        reply.close()


def _check_queue(llm: AsyncLLM, config: ServeConfig) -> None:
    """Refuse what would wait behind more than `max_queue` others."""
    if config.max_queue is None:
        return
    waiting = llm.num_unfinished - llm.config.max_num_seqs
    if max(waiting, llm.stats.num_waiting) >= config.max_queue:
        message = f"The queue is full ({config.max_queue} requests); try again later."
        raise APIError(503, message, code="queue_full", headers={"Retry-After": "1"})


def _check_length(llm: AsyncLLM, body: SamplingBody, stream: RequestStream, name: str) -> None:
    asked, length = getattr(body, name), len(stream.prompt_token_ids)
    if asked is not None and length + asked > llm.max_model_len:
        raise APIError(
            400,
            f"{name} is {asked} and the prompt has {length} tokens, but max_model_len is {llm.max_model_len}; ask for "
            f"at most {llm.max_model_len - length}.",
            param=name,
            code="context_length_exceeded",
        )


def _salt(config: ServeConfig, request: Request, asked: str | None) -> str | None:
    """Users with different API keys share no cached prefix, since the time to the first token would show a hit."""
    key = getattr(request.state, "key", None)
    if key is None:
        return asked
    digest = hashlib.sha256(config.api_keys[key].encode()).hexdigest()
    return f"{digest}:{asked}" if asked else digest
