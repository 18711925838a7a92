"""From `SamplingParams` to the few numbers that the device and the stop check need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from nanovllm_jax.engine.seeding import make_key
from nanovllm_jax.errors import RequestError
from nanovllm_jax.sampling_params import SamplingParams

MAX_ADJUSTMENTS = 512  # biases and bans a row; the device holds a table of this width
FOREVER = 2**31 - 1

Adjustment = tuple[int, float, int]  # token id, added to its logit, while fewer tokens than this are generated


class SamplingPlan(NamedTuple):
    """One request's sampling, ready for the device. The default is greedy and never stops.

    `variant` is the cheapest sampler that can serve it. `bad_words` are the banned sequences of two or more tokens;
    they depend on what was generated, so their bans are recomputed each step.
    """

    variant: Literal["plain", "filtered", "full"] = "plain"
    top_k: int = 0
    key: tuple[int, int] = (0, 0)
    # In the order of step.state.RowFloat: temperature, top_p, min_p, repetition, presence, frequency.
    floats: tuple[float, float, float, float, float, float] = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    adjustments: tuple[Adjustment, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_token_ids: frozenset[int] = frozenset()

    def bans_after(self, output_token_ids: Sequence[int]) -> tuple[Adjustment, ...]:
        """Bans of the tokens that would complete a bad word after this output."""
        banned = []
        for word in self.bad_words:
            prefix = list(word[:-1])
            if list(output_token_ids[-len(prefix) :]) == prefix:
                banned.append((word[-1], float("-inf"), FOREVER))
        return tuple(banned)


def plan_sampling(
    params: SamplingParams,
    *,
    seed: int,
    sample_index: int,
    eos_token_ids: Iterable[int],
    bad_words: Sequence[Sequence[int]],
    vocab_size: int,
) -> SamplingPlan:
    """Work out a request's `SamplingPlan`.

    Args:
        params: the user's, already validated by themselves.
        seed: params.seed, or the engine's draw where that is None.
        sample_index: of the n samples of a request.
        eos_token_ids: the model's end ids.
        bad_words: token ids of each bad word.
        vocab_size: V; ids at or above it are refused.

    Raises:
        RequestError: for ids outside the vocabulary, or more biases and bans than the device's table holds.
    """
    stop_ids = frozenset(params.stop_token_ids or ())
    ends = frozenset(eos_token_ids)
    adjustments: list[Adjustment] = [(i, bias, FOREVER) for i, bias in (params.logit_bias or {}).items()]
    if params.min_tokens:
        adjustments += [(i, float("-inf"), params.min_tokens) for i in sorted(stop_ids | ends)]
    adjustments += [(word[0], float("-inf"), FOREVER) for word in bad_words if len(word) == 1]
    longer = tuple(tuple(word) for word in bad_words if len(word) > 1)
    for token, _, _ in adjustments:
        if not 0 <= token < vocab_size:
            name = "logit_bias" if token in (params.logit_bias or ()) else "stop_token_ids"
            raise RequestError(
                f"{name} has the token {token}; ids go from 0 to {vocab_size - 1}: use ids of this model's tokenizer.",
                param=name,
            )
    if len(adjustments) + len(longer) > MAX_ADJUSTMENTS:
        raise RequestError(
            f"logit_bias, bad_words and min_tokens need {len(adjustments) + len(longer)} entries; the limit is "
            f"{MAX_ADJUSTMENTS}: name fewer tokens.",
            param="logit_bias" if params.logit_bias else "bad_words" if bad_words else "min_tokens",
        )
    penalised = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    filtered = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)
    if penalised or adjustments or longer or params.logprobs is not None:
        variant = "full"
    else:
        variant = "filtered" if filtered else "plain"
    return SamplingPlan(
        variant=variant,
        top_k=max(params.top_k, 0),
        key=make_key(seed, sample_index),
        floats=(
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        ),
        adjustments=tuple(adjustments),
        bad_words=longer,
        stop_token_ids=stop_ids if params.ignore_eos else stop_ids | ends,
    )
