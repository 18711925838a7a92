"""How to sample: vLLM's names, defaults and limits, checked when the object is made."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanovllm_jax.errors import RequestError

logger = logging.getLogger(__name__)

# vLLM's numbers: below the first, sampling is greedy; below the second, logits / temperature may overflow.
GREEDY_TEMPERATURE = 1e-5
MIN_TEMPERATURE = 1e-2
MAX_TEMPERATURE = 2.0
MAX_SAMPLES = 16384
MAX_LOGIT_BIAS = 100.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request; immutable, with vLLM's names, defaults and checks.

    Attributes:
        n: samples of each prompt; at most 16384, and 1 when greedy.
        temperature: 0 to 2. 0 is greedy and switches top_p, top_k and min_p off; what lies between 0 and 0.01
            is raised to 0.01.
        top_p: (0, 1]; keep the fewest tokens whose probabilities sum to at least this.
        top_k: keep the k most likely tokens; 0 or -1 keeps all (stored as 0).
        min_p: [0, 1]; drop tokens less likely than this times the most likely one.
        repetition_penalty: above 0; divides (multiplies, if negative) logits of tokens in prompt or output.
        presence_penalty: -2 to 2; subtracted from the logits of tokens in the output.
        frequency_penalty: -2 to 2; subtracted once for each time the token is in the output.
        stop: string or strings that end the output; stored as a tuple.
        stop_token_ids: token ids that end the output; stored as a tuple.
        bad_words: strings that may not be generated; stored as a tuple.
        logit_bias: added to the logits of these token ids; clamped to -100 to 100.
        min_tokens: end-of-sequence and stop_token_ids are not sampled before this many output tokens.
        max_tokens: longest output; None means up to the model's limit.
        ignore_eos: go on after an end-of-sequence token.
        seed: 64-bit seed of the random draw; None (or -1) takes one from the engine.
        logprobs: log-probabilities of this many top tokens with each output token; at most the engine's max_logprobs.
        prompt_logprobs: the same for each prompt token.
        detokenize: make text from token ids; stop strings need it.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string at the end of the text.

    Raises:
        RequestError: if a value is outside its limits.
        TypeError: for an argument that does not exist.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self._check_filters()
        self._check_penalties()
        self._check_lengths()
        self._check_stops()
        if self.temperature < GREEDY_TEMPERATURE:
            if self.n > 1:
                raise RequestError(
                    f"n is {self.n} at temperature 0; greedy samples are all equal, so n must be 1. "
                    "Set a temperature above 0 for several samples.",
                    param="n",
                )
            self._store(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)

    def _store(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_filters(self) -> None:
        temperature = _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE, "0 is greedy")
        if GREEDY_TEMPERATURE <= temperature < MIN_TEMPERATURE:
            logger.warning("temperature %s is raised to %s: smaller ones overflow.", temperature, MIN_TEMPERATURE)
            temperature = MIN_TEMPERATURE
        self._store(temperature=temperature)
        top_p = _number("top_p", self.top_p, 0.0, 1.0, "1 keeps all tokens")
        if top_p == 0.0:
            message = "top_p is 0; it must be above 0 and at most 1. Use temperature=0 for greedy sampling."
            raise RequestError(message, param="top_p")
        self._store(top_p=top_p)
        self._store(top_k=max(0, _integer("top_k", self.top_k, -1, None, "0 keeps all tokens")))
        self._store(min_p=_number("min_p", self.min_p, 0.0, 1.0, "0 keeps all tokens"))

    def _check_penalties(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            self._store(**{name: _number(name, getattr(self, name), -2.0, 2.0, "0 switches it off")})
        penalty = _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "1 switches it off")
        if penalty == 0.0:
            message = "repetition_penalty is 0; it must be above 0. 1 switches it off."
            raise RequestError(message, param="repetition_penalty")
        self._store(repetition_penalty=penalty)
        if self.logit_bias is not None:
            self._store(logit_bias=_logit_bias(self.logit_bias))

    def _check_lengths(self) -> None:
        self._store(n=_integer("n", self.n, 1, MAX_SAMPLES, "send the prompt again for more samples"))
        self._store(min_tokens=_integer("min_tokens", self.min_tokens, 0, None, "0 switches it off"))
        if self.max_tokens is not None:
            max_tokens = _integer("max_tokens", self.max_tokens, 1, None, "None means the model's limit")
            self._store(max_tokens=max_tokens)
            if self.min_tokens > max_tokens:
                message = f"min_tokens is {self.min_tokens}, above max_tokens {max_tokens}; raise max_tokens."
                raise RequestError(message, param="min_tokens")
        if self.seed is not None:
            seed = _integer("seed", self.seed, -(2**63), 2**64 - 1, "None takes one from the engine")
            self._store(seed=None if seed == -1 else seed)
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                value = 1 if value is True else value
                value = _integer(name, value, 0, None, "None means none")
                self._store(**{name: value})

    def _check_stops(self) -> None:
        self._store(stop=_strings("stop", self.stop))
        self._store(bad_words=_strings("bad_words", self.bad_words))
        if isinstance(self.stop_token_ids, int | str):
            message = f"stop_token_ids is {self.stop_token_ids!r}; it must be a list of token ids."
            raise RequestError(message, param="stop_token_ids")
        ids = (_integer("stop_token_ids", i, 0, None, "give token ids") for i in self.stop_token_ids or ())
        self._store(stop_token_ids=tuple(dict.fromkeys(ids)))
        if self.stop and not self.detokenize:
            raise RequestError(
                f"stop is {list(self.stop)!r} but detokenize is False; stop strings are found in text. "
                "Set detokenize=True or use stop_token_ids.",
                param="stop",
            )


def _number(name: str, value: Any, low: float, high: float, hint: str) -> float:
    """`value` as a finite float within [low, high]."""
    limit = f"between {low:g} and {high:g}" if high != math.inf else f"at least {low:g} and finite"
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        raise RequestError(f"{name} is {value!r}; it must be a number {limit} ({hint}).", param=name)
    return number


def _integer(name: str, value: Any, low: int, high: int | None, hint: str) -> int:
    """`value` as an int within [low, high]; what behaves as an integer (numpy's) is one."""
    limit = f"at least {low}" if high is None else f"between {low} and {high}"
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        raise RequestError(f"{name} is {value!r}; it must be an integer, {limit} ({hint}).", param=name)
    return number


def _strings(name: str, value: Any) -> tuple[str, ...]:
    """`value` as distinct strings, none of them empty; None is none."""
    if not isinstance(value, str | Iterable | None):
        raise RequestError(f"{name} is {value!r}; it must be a string or a list of strings.", param=name)
    strings = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    for string in strings:
        if not isinstance(string, str) or not string:
            message = f"{name} contains {string!r}; each must be a string of at least 1 character."
            raise RequestError(message, param=name)
    return tuple(dict.fromkeys(strings))


def _logit_bias(value: Any) -> dict[int, float]:
    """Token id -> bias, the ids as ints (JSON makes them strings) and the biases clamped."""
    biases = {}
    refuse = partial(RequestError, param="logit_bias")
    if not isinstance(value, Mapping):
        raise refuse(f"logit_bias is {value!r}; it must map token ids to numbers from -100 to 100.")
    for token, bias in value.items():
        try:
            token_id = int(token)
        except (TypeError, ValueError):
            raise refuse(f"logit_bias has the key {token!r}; keys must be token ids.") from None
        if token_id < 0:
            raise refuse(f"logit_bias has the key {token!r}; token ids start at 0.")
        if not isinstance(bias, int | float) or math.isnan(bias):
            raise refuse(f"logit_bias[{token_id}] is {bias!r}; it must be a number from -100 to 100.")
        biases[token_id] = float(min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, bias)))
    return biases
