"""What clients may send: OpenAI's fields, and vLLM's extra ones. Fields that do nothing here are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator
from pydantic_core import PydanticCustomError

from nanovllm_jax.sampling_params import SamplingParams

_MAX_STRINGS = 64
_MAX_PROMPTS = 1024
Strings = str | Annotated[list[str], Field(max_length=_MAX_STRINGS)]
TokenIds = list[StrictInt]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error, as OpenAI's."""

    error: ErrorDetail


class StreamOptions(_Body):
    """What a stream reports beside its text."""

    include_usage: bool = False


class SamplingBody(_Body):
    """Fields that completions and chat share; None takes the model's default."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: Strings | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    # vLLM's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    bad_words: Annotated[list[str], Field(max_length=_MAX_STRINGS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    # Accepted and without effect on the result.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    # Known to OpenAI's clients and not supported.
    response_format: Any = None

    @field_validator("response_format")
    @classmethod
    def _text_only(cls, value: Any) -> Any:
        if value in (None, {"type": "text"}):
            return value
        raise PydanticCustomError("unsupported", "this server writes text only; leave it out")

    def sampling_params(self, defaults: SamplingParams, **given: Any) -> SamplingParams:
        """The request's parameters over the model's defaults.

        Raises:
            RequestError: if a value is out of range; the message starts with its name.
        """
        names = SamplingParams.__slots__
        stated = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        values = {name: getattr(defaults, name) for name in names} | stated | given
        return SamplingParams(**values)


class CompletionBody(SamplingBody):
    """`POST /v1/completions`."""

    # In this order the first kind that fits is right; trying all of them takes longer than tokenising.
    prompt: Annotated[
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=_MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(max_length=_MAX_PROMPTS)],
        Field(union_mode="left_to_right"),
    ]
    logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    @field_validator("echo", "suffix", "best_of")
    @classmethod
    def _unsupported(cls, value: Any) -> Any:
        if value:
            raise PydanticCustomError("unsupported", "it is not supported; leave it out")
        return value


class ContentPart(BaseModel):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation; other fields go to the chat template."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[ContentPart] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ChatBody(SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None

    @field_validator("tools", "tool_choice", "functions", "function_call", "modalities", "audio")
    @classmethod
    def _unsupported(cls, value: Any) -> Any:
        if value in (None, [], "none", ["text"]):
            return value
        raise PydanticCustomError("unsupported", "it is not supported; leave it out")


class TokenizeBody(_Body):
    """`POST /tokenize`: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(_Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]
