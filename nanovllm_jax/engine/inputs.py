"""Prompts as users write them, checked and turned into token ids."""

from __future__ import annotations

import inspect
import struct
from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from nanovllm_jax.errors import RequestError


class TextPrompt(TypedDict, total=False):
    """A prompt as text; `cache_salt` keeps its cached prefix apart from other salts'."""

    prompt: str
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids."""

    prompt_token_ids: Sequence[int]
    cache_salt: str


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt

_DICT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


class ParsedPrompt(NamedTuple):
    """Token ids as int32, the text they came from if any, and the salt of their cached prefix."""

    token_ids: array[int]
    text: str | None
    cache_salt: str | None


def parse_prompt(prompt: Prompt, tokenizer: Any | None, vocab_size: int) -> ParsedPrompt:
    """Text, token ids or a dict of either, as token ids.

    Raises:
        RequestError: for an empty prompt, ids outside the vocabulary, an unknown dict key, or text without a
            tokenizer.
    """
    salt = None
    if isinstance(prompt, Mapping):
        unknown = prompt.keys() - _DICT_KEYS
        if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
            raise RequestError(
                f"A prompt dict has the keys {sorted(prompt)}; give either 'prompt' or 'prompt_token_ids', and "
                "'cache_salt' if you like.",
                param="prompt",
            )
        salt = prompt.get("cache_salt")
        if salt is not None:
            if not isinstance(salt, str) or not salt:
                message = f"cache_salt is {salt!r}; it must be a string of at least 1 character."
                raise RequestError(message, param="cache_salt")
            check_text(salt, "cache_salt")
        prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]  # pyright: ignore
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError(
                "The prompt is text, but the engine has no tokenizer (skip_tokenizer_init=True): give "
                "'prompt_token_ids', or load the tokenizer.",
                param="prompt",
            )
        check_text(prompt, "prompt")
        token_ids = array("i", tokenizer(prompt).input_ids)
        if not token_ids:
            raise RequestError(f"The prompt {prompt!r} has no tokens; give at least 1 character.", param="prompt")
        return ParsedPrompt(token_ids, prompt, salt)
    return ParsedPrompt(_check_ids(prompt, vocab_size), None, salt)


def check_text(text: str, param: str) -> None:
    """Whether a text can be encoded; one with half of a surrogate pair, as JSON may hold, cannot.

    Raises:
        RequestError: about `param`, if it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{param} holds no valid Unicode text ({error}); mend it.", param=param) from None


def _check_ids(prompt: Any, vocab_size: int) -> array[int]:
    ids = prompt
    try:
        ids = prompt if isinstance(prompt, list | tuple) else list(prompt)
        token_ids = _as_int32(ids)
    except OverflowError:
        raise _outside(min(ids), max(ids), vocab_size) from None
    except TypeError:
        raise RequestError(
            f"The prompt is {type(prompt).__name__} {str(prompt)[:80]!r}; give a string, a list of token ids, or a "
            "dict with 'prompt' or 'prompt_token_ids'.",
            param="prompt",
        ) from None
    if not token_ids:
        raise RequestError("The prompt has no tokens; give at least 1 token id.", param="prompt")
    # Unsigned, negative ids are the largest of all.
    if np.maximum.reduce(np.frombuffer(token_ids, np.uint32)) >= vocab_size:
        raise _outside(min(token_ids), max(token_ids), vocab_size)
    return token_ids


def _as_int32(ids: Sequence[Any]) -> array[int]:
    """Whatever counts as integers, 10 ns each; NumPy and `array` alone need 20.

    Raises:
        OverflowError, TypeError: for what is no int32.
    """
    token_ids = array("i")
    try:
        token_ids.frombytes(struct.pack(f"{len(ids)}i", *ids))
    except struct.error:  # says the same of both
        return array("i", ids)
    return token_ids


def _outside(smallest: int, largest: int, vocab_size: int) -> RequestError:
    worst = largest if largest >= vocab_size else smallest
    message = f"The prompt holds token id {worst}; ids go from 0 to {vocab_size - 1}: use this model's tokenizer."
    return RequestError(message, param="prompt")


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **template_args: Any) -> list[int]:
    """Token ids of a conversation through the tokenizer's chat template.

    Raises:
        RequestError: without messages or a template, or if the messages do not fit the template.
    """
    if not messages:
        message = "The conversation has no messages; give at least one, with 'role' and 'content'."
        raise RequestError(message, param="messages")
    if isinstance(messages, str | Mapping) or not all(isinstance(message, Mapping) for message in messages):
        message = f"The conversation is {str(messages)[:80]!r}; give a list of dicts, each with 'role' and 'content'."
        raise RequestError(message, param="messages")
    try:
        rendered = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **template_args)
    except Exception as error:  # templates are programs of the model's authors: they raise what they like
        message = f"The chat template does not take these messages: {error}"
        raise RequestError(message, param="messages") from error
    return list(rendered["input_ids"])


def check_template_variables(tokenizer: Any, given: Mapping[str, Any], allowed: Collection[str] = ()) -> None:
    """Refuse what would reach the tokenizer instead of the template: `max_length` may ask for gigabytes of padding.

    Args:
        tokenizer: whose template is meant.
        given: variables by name.
        allowed: arguments that may be set all the same.

    Raises:
        RequestError: if another variable has the name of an argument.
    """
    taken = {
        name
        for function in (type(tokenizer).apply_chat_template, render_chat)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    if wrong := given.keys() & taken - {"documents", *allowed}:  # documents are only handed on to the template
        message = f"chat_template_kwargs: {min(wrong)} cannot be set here; give variables of the chat template."
        raise RequestError(message, param="chat_template_kwargs")


def bad_word_ids(words: Sequence[str], tokenizer: Any | None) -> list[list[int]]:
    """Token ids of each bad word, as it stands at the start of a text and after a space.

    Raises:
        RequestError: without a tokenizer, or for a word that is no valid Unicode text.
    """
    if words and tokenizer is None:
        message = f"bad_words is {list(words)!r}, but the engine has no tokenizer to find their tokens."
        raise RequestError(message, param="bad_words")
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        check_text(word, "bad_words")
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tokenizer(text, add_special_tokens=False).input_ids  # pyright: ignore
            if ids:
                found[tuple(ids)] = None
    return [list(ids) for ids in found]
