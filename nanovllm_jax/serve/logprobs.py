"""Log-probabilities in OpenAI's two formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanovllm_jax.outputs import Logprob

Entries = Sequence[dict[int, Logprob]]  # one a token; the token that stands there comes first


def completion_logprobs(entries: Entries, wanted: int, offset: int) -> dict[str, Any]:
    """`/v1/completions`: parallel lists; `offset` is the text's length before the first token."""
    tokens: list[str] = []
    offsets: list[int] = []
    for entry in entries:
        tokens.append(_text(next(iter(entry.values()))))
        offsets.append(offset)
        offset += len(tokens[-1])
    return {
        "tokens": tokens,
        "token_logprobs": [next(iter(entry.values())).logprob for entry in entries],
        "top_logprobs": [{_text(one): one.logprob for one in _best(entry, wanted)} for entry in entries],
        "text_offset": offsets,
    }


def chat_logprobs(entries: Entries, wanted: int) -> dict[str, Any]:
    """`/v1/chat/completions`: one object a token."""
    content = []
    for entry in entries:
        chosen = next(iter(entry.values()))
        content.append({**_one(chosen), "top_logprobs": [_one(other) for other in _best(entry, wanted)]})
    return {"content": content, "refusal": None}


def _best(entry: dict[int, Logprob], wanted: int) -> list[Logprob]:
    ranked = sorted(entry.values(), key=lambda one: one.rank or 0)
    return [one for one in ranked if (one.rank or 0) <= wanted]


def _one(logprob: Logprob) -> dict[str, Any]:
    text = _text(logprob)
    return {"token": text, "logprob": max(logprob.logprob, -9999.0), "bytes": list(text.encode())}


def _text(logprob: Logprob) -> str:
    return logprob.decoded_token or ""
