"""What the two endpoints that generate have in common with the batch runner: from a request's body to a `Reply`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from nanovllm_jax.async_llm import AsyncLLM, RequestStream
from nanovllm_jax.engine.inputs import Prompt, check_template_variables
from nanovllm_jax.errors import DeviceError, RequestError
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.serve.config import ServeConfig
from nanovllm_jax.serve.errors import APIError, from_engine
from nanovllm_jax.serve.protocol import ChatBody, CompletionBody, SamplingBody
from nanovllm_jax.serve.replies import Reply

_OPENAI_MAX_TOKENS = 16  # of /v1/completions
_SAME_NAMES: Mapping[str, str] = MappingProxyType({})


def check_model(config: ServeConfig, model: str | None) -> None:
    """Refuse another model's name; none is this server's.

    Raises:
        APIError: 404.
    """
    if model is not None and model != config.model_name:
        message = f"The model {model!r} does not exist; this server has {config.model_name!r}."
        raise APIError(404, message, param="model", code="model_not_found")


async def open_reply(llm: AsyncLLM, config: ServeConfig, body: SamplingBody, key: str | None = None) -> Reply:
    """Queue what a body asks for. Whoever gets the reply closes it.

    Args:
        llm: the engine.
        config: the server's settings.
        body: of /v1/completions or of /v1/chat/completions.
        key: the API key that came with it.

    Raises:
        APIError: if it cannot be served.
    """
    return await (_chat if isinstance(body, ChatBody) else _completion)(llm, config, body, key)  # pyright: ignore


async def _completion(llm: AsyncLLM, config: ServeConfig, body: CompletionBody, key: str | None) -> Reply:
    try:
        max_tokens = _OPENAI_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        params = body.sampling_params(llm.get_default_sampling_params(), max_tokens=max_tokens)
    except RequestError as error:
        raise from_engine(error) from error
    prompt = body.prompt
    many: Sequence[Any] = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    prompts = [{"prompt" if isinstance(one, str) else "prompt_token_ids": one} for one in many]
    return await _open(llm, config, body, key, prompts, params, is_chat=False, top=body.logprobs)


async def _chat(llm: AsyncLLM, config: ServeConfig, body: ChatBody, key: str | None) -> Reply:
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    top = (body.top_logprobs or 0) if body.logprobs else None
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    fields = {"prompt": "messages", "logprobs": "top_logprobs", "max_tokens": name}
    try:
        params = body.sampling_params(llm.get_default_sampling_params(), max_tokens=getattr(body, name), logprobs=top)
        extra = body.chat_template_kwargs or {}
        if extra:
            _check_template_variables(llm, extra)
        messages = [message.plain() for message in body.messages]
        ids = await llm.render_chat(messages, add_generation_prompt=body.add_generation_prompt, **extra)
    except RequestError as error:
        raise from_engine(error, fields) from error
    prompts = [{"prompt_token_ids": ids}]
    return await _open(llm, config, body, key, prompts, params, is_chat=True, top=top, fields=fields)


async def _open(
    llm: AsyncLLM,
    config: ServeConfig,
    body: SamplingBody,
    key: str | None,
    prompts: list[dict[str, Any]],
    params: SamplingParams,
    *,
    is_chat: bool,
    top: int | None,
    fields: Mapping[str, str] = _SAME_NAMES,
) -> Reply:
    check_model(config, body.model)
    if body.stream_options is not None and not body.stream:
        raise APIError(400, "stream_options needs stream to be true.", param="stream_options")
    _check_queue(llm, config, len(prompts) * params.n)
    salt = _salt(key, body.cache_salt)
    streams: list[RequestStream] = []
    usage = body.stream_options is not None and body.stream_options.include_usage
    reply = Reply(config.model_name, is_chat, streams, params.n, top, usage)
    try:
        for prompt in prompts:
            salted: Prompt = {**prompt, "cache_salt": salt} if salt else prompt  # pyright: ignore
            streams.append(await llm.add_request(salted, params, priority=body.priority, stream=body.stream))
            _check_length(llm, body, streams[-1], fields.get("max_tokens", "max_tokens"))
    except (RequestError, DeviceError) as error:
        reply.close()
        raise from_engine(error, fields) from error
    except BaseException:
        reply.close()
        raise
    return reply


def _check_template_variables(llm: AsyncLLM, given: Mapping[str, Any]) -> None:
    try:
        check_template_variables(llm.get_tokenizer(), given)
    except RequestError as error:
        raise APIError(400, str(error), param=error.param, code="unsupported_parameter") from error


def _check_queue(llm: AsyncLLM, config: ServeConfig, num_samples: int) -> None:
    """Refuse what would make more than `max_queue` samples wait."""
    if config.max_queue is None:
        return
    num_rows = llm.config.max_num_seqs * llm.config.data_parallel_size
    if num_samples > num_rows + config.max_queue:
        most = num_rows + config.max_queue
        message = f"The request asks for {num_samples} samples; this server takes {most} at a time: send fewer."
        raise APIError(400, message, param="n")
    num_ahead = max(llm.num_unfinished - num_rows, llm.stats.num_waiting)
    num_free = 0 if num_ahead else num_rows - llm.num_unfinished  # a free row is not for who comes last
    if num_ahead + max(num_samples - num_free, 0) > config.max_queue:
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


def _salt(key: str | None, asked: str | None) -> str | None:
    """Users with different API keys share no cached prefix, since the time to the first token would show a hit."""
    if key is None:
        return asked
    digest = hashlib.sha256(key.encode()).hexdigest()
    return f"{digest}:{asked}" if asked else digest
