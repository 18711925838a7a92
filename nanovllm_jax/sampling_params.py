"""How to sample: vLLM's names, defaults and limits, checked when the object is made."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
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
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    bad_words: Sequence[str] | None = ()
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
        for name, (default, check) in _CHECKS.items():
            value = getattr(self, name)
            if value is not default:  # most are: a request's parameters cost 6 us instead of 25
                object.__setattr__(self, name, check(name, value))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            message = f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}; raise max_tokens."
            raise RequestError(message, param="min_tokens")
        if self.stop and not self.detokenize:
            raise RequestError(
                f"stop is {list(self.stop)!r} but detokenize is False; stop strings are found in text. "
                "Set detokenize=True or use stop_token_ids.",
                param="stop",
            )
        if self.temperature < GREEDY_TEMPERATURE:
            if self.n > 1:
                raise RequestError(
                    f"n is {self.n} at temperature 0; greedy samples are all equal, so n must be 1. "
                    "Set a temperature above 0 for several samples.",
                    param="n",
                )
            for name, value in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                object.__setattr__(self, name, value)


def _temperature(name: str, value: Any) -> float:
    temperature = _number(name, value, 0.0, MAX_TEMPERATURE, "0 is greedy")
    if GREEDY_TEMPERATURE <= temperature < MIN_TEMPERATURE:
        logger.warning("temperature %s is raised to %s: smaller ones overflow.", temperature, MIN_TEMPERATURE)
        return MIN_TEMPERATURE
    return temperature


def _top_p(name: str, value: Any) -> float:
    top_p = _number(name, value, 0.0, 1.0, "1 keeps all tokens")
    if top_p == 0.0:
        message = "top_p is 0; it must be above 0 and at most 1. Use temperature=0 for greedy sampling."
        raise RequestError(message, param="top_p")
    return top_p


def _repetition_penalty(name: str, value: Any) -> float:
    penalty = _number(name, value, 0.0, math.inf, "1 switches it off")
    if penalty == 0.0:
        message = "repetition_penalty is 0; it must be above 0. 1 switches it off."
        raise RequestError(message, param="repetition_penalty")
    return penalty


def _max_tokens(name: str, value: Any) -> int | None:
    return None if value is None else _integer(name, value, 1, None, "None means the model's limit")


def _seed(name: str, value: Any) -> int | None:
    seed = _integer(name, value, -(2**63), 2**64 - 1, "None takes one from the engine")
    return None if seed == -1 else seed


def _num_logprobs(name: str, value: Any) -> int:
    return _integer(name, 1 if value is True else value, 0, None, "None means none")


def _stop_token_ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, int | str):
        message = f"stop_token_ids is {value!r}; it must be a list of token ids."
        raise RequestError(message, param="stop_token_ids")
    ids = (_integer(name, i, 0, None, "give token ids") for i in value or ())
    return tuple(dict.fromkeys(ids))


def _number(name: str, value: Any, low: float, high: float, hint: str) -> float:
    """`value` as a finite float within [low, high]."""
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        limit = f"between {low:g} and {high:g}" if high != math.inf else f"at least {low:g} and finite"
        raise RequestError(f"{name} is {value!r}; it must be a number {limit} ({hint}).", param=name)
    return number


def _integer(name: str, value: Any, low: int, high: int | None, hint: str) -> int:
    """`value` as an int within [low, high]; what behaves as an integer (numpy's) is one."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
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


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    """Token id -> bias, the ids as ints (JSON makes them strings) and the biases clamped."""
    biases = {}
    refuse = partial(RequestError, param=name)
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


_Check = Callable[[str, Any], Any]  # of a field's name and value: what is stored


def _number_within(low: float, high: float, hint: str) -> _Check:
    return lambda name, value: _number(name, value, low, high, hint)


def _integer_from(low: int, hint: str, high: int | None = None) -> _Check:
    return lambda name, value: _integer(name, value, low, high, hint)


def _checks() -> dict[str, tuple[Any, _Check]]:
    """Default and check of each field that has one, in the order in which they are checked."""
    penalty = _number_within(-2.0, 2.0, "0 switches it off")
    checks: dict[str, _Check] = {
        "temperature": _temperature,
        "top_p": _top_p,
        "top_k": lambda name, value: max(0, _integer(name, value, -1, None, "0 keeps all tokens")),
        "min_p": _number_within(0.0, 1.0, "0 keeps all tokens"),
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
        "repetition_penalty": _repetition_penalty,
        "logit_bias": _logit_bias,
        "n": _integer_from(1, "send the prompt again for more samples", MAX_SAMPLES),
        "min_tokens": _integer_from(0, "0 switches it off"),
        "max_tokens": _max_tokens,
        "seed": _seed,
        "logprobs": _num_logprobs,
        "prompt_logprobs": _num_logprobs,
        "stop": _strings,
        "bad_words": _strings,
        "stop_token_ids": _stop_token_ids,
    }
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    return {name: (defaults[name], check) for name, check in checks.items()}


_CHECKS = _checks()
