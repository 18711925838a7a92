"""From token ids to text, token by token, with stop strings; no character is ever split.

Text is decoded lazily: without stop strings, a request whose text nobody asks for until it ends is decoded in
one call (0.2 µs a token); with them, or when streamed, each new token is decoded with a few tokens before it
(3 µs a token), the method of Text Generation Inference: a decoder's output for one token depends on its
neighbours (leading spaces, bytes of one character), never on tokens further back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

_CONTEXT = 5  # prompt tokens decoded before the first new one: enough for a special token or two and a word
_MAX_HELD = 16  # tokens held back for an unfinished character; a real one ends within 4
_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character (yet)


class Detokenizer:
    """The text of one output sequence.

    Args:
        tokenizer: a transformers or a `tokenizers` tokenizer.
        prompt_token_ids: ids before the first output token; they decide whether the text starts with a space.
        stop: strings that end the text; they may span tokens.
        include_stop_str_in_output: keep the stop string at the end of the text.
        skip_special_tokens: leave special tokens out of the text.
        min_tokens: stop strings that end within this many first tokens are ignored.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._decode = _decode_function(tokenizer, skip_special_tokens)
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._text = ""
        self._stopped = False
        self._ids, self._read = _context(self._decode, prompt_token_ids)
        # _text stands for _ids[:_read]; _ids[_prefix:_read] is the context of what comes next.
        self._prefix = 0
        self._context_text: str | None = None

    def append(self, token_ids: Sequence[int]) -> str | None:
        """Adds output tokens; returns the stop string that they complete, if any.

        Once a stop string was returned the text is final. A stop *token* is left out by the caller unless its
        text is wanted.
        """
        if self._stopped:
            return None
        self._ids.extend(token_ids)
        self._num_tokens += len(token_ids)
        if not self._stop:
            return None
        searched = len(self._text)
        self._decode_pending()
        if self._num_tokens <= self._min_tokens:
            return None
        found = _first_stop(self._text, self._stop, searched)
        if found is None:
            return None
        start, stop = found
        self._text = self._text[: start + len(stop) if self._include_stop else start]
        self._stopped = True
        return stop

    def text(self, finished: bool) -> str:
        """The text so far.

        Unless `finished`, it ends before an unfinished character and before anything that could still become
        a stop string, so that what was once returned is never taken back.
        """
        if self._stopped:
            return self._text
        self._decode_pending()
        if finished:
            if self._read < len(self._ids):
                # Bytes that never became a character show as decoders show them.
                self._take(len(self._ids), force=True)
            return self._text
        if self._include_stop:
            return self._text
        return self._text[: len(self._text) - _held_back(self._text, self._stop)]

    def _decode_pending(self) -> None:
        """Decodes all tokens not yet decoded: at once if they hold whole characters, else one by one."""
        num_pending = len(self._ids) - self._read
        if num_pending > 1 and _REPLACEMENT not in self._decode(self._ids[self._prefix :]):
            self._take(len(self._ids))
            return
        for end in range(self._read + 1, len(self._ids) + 1):
            self._take(end, force=end - self._read > _MAX_HELD)

    def _take(self, end: int, force: bool = False) -> None:
        """Moves the text on to `_ids[:end]`, unless that ends within a character."""
        if self._context_text is None:
            self._context_text = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix : end])
        if not force and (len(text) <= len(self._context_text) or text.endswith(_REPLACEMENT)):
            return
        self._text += text[len(self._context_text) :]
        self._prefix, self._read = self._read, end
        self._context_text = None  # decoded when more comes


def _decode_function(tokenizer: Any, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """The tokenizer's decoding without its clean-up, which would change what the model wrote."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if type(backend).__module__.startswith("tokenizers"):
        return partial(backend.decode, skip_special_tokens=skip_special_tokens)
    return partial(tokenizer.decode, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def _context(decode: Callable[[list[int]], str], prompt_token_ids: Sequence[int]) -> tuple[list[int], int]:
    """The prompt's last tokens, from one that starts a character, and how many of them to see as read.

    A prompt may end within a character: its bytes are then not read yet, so that the output shows it.
    """
    for length in range(_CONTEXT, _CONTEXT + 4):
        ids = list(prompt_token_ids[-length:])
        for read in range(len(ids), max(0, len(ids) - 4), -1):
            text = decode(ids[:read])
            if not text.startswith(_REPLACEMENT) and not text.endswith(_REPLACEMENT):
                return ids, read
    ids = list(prompt_token_ids[-_CONTEXT:])
    return ids, len(ids)


def _first_stop(text: str, stops: Sequence[str], searched: int) -> tuple[int, str] | None:
    """Start and name of the stop string that ends first past `searched`, the longest if several do."""
    found: tuple[int, int, str] | None = None
    for stop in stops:
        start = text.find(stop, max(0, searched - len(stop) + 1))
        if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
            found = (start + len(stop), start, stop)
    return found and found[1:]


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string begins."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
