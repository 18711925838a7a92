"""The second half of a step: logits of the last hidden states, a draw a row, and the rows' counters."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.params import Params, head_weight
from nanovllm_jax.models.transformer import Unfinished, finish
from nanovllm_jax.models.transformer import logits as compute_logits
from nanovllm_jax.step.logprobs import gather_logprobs
from nanovllm_jax.step.penalties import count_prompt, count_sampled
from nanovllm_jax.step.sampler import (
    FullState,
    Sampled,
    SamplerParams,
    sample_filtered,
    sample_full,
    sample_plain,
)
from nanovllm_jax.step.state import Extras, RowFloat, RowInt, Rows, slots_of
from nanovllm_kernels import sample_head
from nanovllm_kernels.sample.vocab import vocab_offset

Variant = Literal["plain", "filtered"]
Backend = Literal["xla", "triton"]
COUNT_CHUNK = 1024  # known tokens counted a call
MOST_ROWS_WITHOUT_LOGITS = 64  # past that cuBLAS and the sampler are faster
LOGPROB_CHUNK = 64  # prompt tokens whose logits are held at once


def draw(
    variant: Variant,
    num_rows: int,
    axis_name: str | None,
    backend: Backend,
    head: Params,
    rows: Rows,
    hidden: Float[Array, "R E"],
    sampled_rows: Int[Array, " R"],
) -> tuple[Rows, Int[Array, " B"]]:
    """Sample a token for each of the first `num_rows` hidden states; it stays on the device as LAST_TOKEN.

    Args:
        variant: "plain" (greedy and temperature) or "filtered" (also top-k, top-p, min-p).
        num_rows: B, static.
        axis_name: mesh axis over which the vocabulary is split, if it is; so in the other functions here.
        backend: of `nanovllm_kernels.sample`.
        head: see `head_of`.
        rows: donated.
        hidden: last hidden states, of which the first B are used.
        sampled_rows: the row of each, -1 for padding and for prompts that are not finished.

    Returns:
        rows and the tokens, -1 where the logits were not finite.
    """
    row = slots_of(rows, sampled_rows[:num_rows])
    tokens = draw_tokens(variant, axis_name, backend, head, hidden[:num_rows], params_of(rows, row))
    return _remember(rows, row, tokens), tokens


def draw_tokens(
    variant: Variant,
    axis_name: str | None,
    backend: Backend,
    head: Params,
    hidden: Float[Array, "B E"],
    params: SamplerParams,
) -> Int[Array, " B"]:
    """A token for each hidden state, -1 where the logits were not finite."""
    # Logits that nobody else needs are not written: 17 us of 1.16 ms for a token of 32 rows (H200).
    one_kernel = backend == "triton" and axis_name is None and hidden.dtype.itemsize == 2
    if variant == "plain" and one_kernel and len(hidden) <= MOST_ROWS_WITHOUT_LOGITS:
        weight = head_weight(head)
        with jax.named_scope("sample_head"):
            return sample_head(hidden, weight, params.temperature, params.key, params.position, backend=backend)
    logits = compute_logits(head, hidden, backend)
    sampler = sample_plain if variant == "plain" else sample_filtered
    with jax.named_scope("sample"):
        return sampler(logits, params, axis_name=axis_name, backend=backend)


def draw_full(
    num_rows: int,
    num_logprobs: int,
    axis_name: str | None,
    backend: Backend,
    head: Params,
    rows: Rows,
    extras: Extras,
    hidden: Float[Array, "R E"],
    sampled_rows: Int[Array, " R"],
) -> tuple[Rows, Extras, Sampled]:
    """`draw` with penalties, biases and bans, and log-probabilities of the raw logits."""
    row = slots_of(rows, sampled_rows[:num_rows])
    logits, params = compute_logits(head, hidden[:num_rows], backend), params_of(rows, row)
    state = FullState(
        counts=extras["counts"],
        rows=jnp.where(sampled_rows[:num_rows] >= 0, row, -1),
        adjust_ids=extras["adjust_ids"][row],
        adjust_values=extras["adjust_values"][row],
        adjust_until=extras["adjust_until"][row],
    )
    with jax.named_scope("sample"):
        sampled = sample_full(logits, params, state, num_logprobs=num_logprobs, axis_name=axis_name, backend=backend)
    offset = vocab_offset(extras["counts"].shape[1], axis_name)
    counts = count_sampled(extras["counts"], state.rows, sampled.tokens, vocab_offset=offset)
    return _remember(rows, row, sampled.tokens), extras | {"counts": counts}, sampled


def prompt_logprobs(
    config: ModelConfig,
    num_logprobs: int,
    axis_name: str | None,
    backend: Backend,
    tail: Params,
    unfinished: Unfinished,
    targets: Int[Array, " T"],
) -> tuple[Float[Array, " T"], Int[Array, " T"], Int[Array, "T N"], Float[Array, "T N"]]:
    """Log-probability and rank of each target after its token, and the best N tokens there.

    Takes the tokens through the rest of the last layer (`tail`: see `tail_of`), which a prefill leaves out; then
    works through them in chunks, since logits of a whole prompt would not fit.
    """
    head = head_of(tail)
    hidden = finish(tail["layer"], tail["final_norm"], config, unfinished, axis_name, backend)
    num_tokens, chunk = hidden.shape[0], min(LOGPROB_CHUNK, hidden.shape[0])
    padding = -num_tokens % chunk
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    targets = jnp.pad(targets, (0, padding)).reshape(-1, chunk)

    def one(chunked: tuple[Array, Array]) -> tuple[Array, Array, Array, Array]:
        logits = compute_logits(head, chunked[0])
        return gather_logprobs(logits, chunked[1], num_logprobs=num_logprobs, axis_name=axis_name)

    results = jax.lax.map(one, (hidden, targets))
    logprobs, ranks, top_ids, top_logprobs = (x.reshape(-1, *x.shape[2:])[:num_tokens] for x in results)
    return logprobs, ranks, top_ids, top_logprobs


def head_of(params: Params) -> Params:
    """The part of the parameters that the logits need."""
    return {"lm_head": head_weight(params)}


def tail_of(params: Params) -> Params:
    """The part of the parameters that turns `Unfinished` tokens into logits."""
    return head_of(params) | {"layer": params["layers"][-1], "final_norm": params["final_norm"]}


def extras_update_length(max_adjustments: int) -> int:
    """Elements of the packed array that `update_extras` takes."""
    return 2 + 3 * max_adjustments + 2 * COUNT_CHUNK


def update_extras(max_adjustments: int, axis_name: str | None, extras: Extras, packed: Int[Array, " n"]) -> Extras:
    """Set one row's biases and bans, and count a chunk of its known tokens.

    Args:
        max_adjustments: M, static.
        axis_name: mesh axis over which the vocabulary is split, if it is.
        extras: donated.
        packed: row; 1 to forget what was counted for the row; ids [M]; values [M] (float32 bits); until [M];
            token ids [COUNT_CHUNK] (-1 padding); and for each 1 if it was generated, 0 if it is of the prompt.
    """
    M = max_adjustments
    row, reset = packed[0], packed[1]
    ids, values, until = packed[2 : 2 + 3 * M].reshape(3, M)
    tokens, is_output = packed[2 + 3 * M :].reshape(2, COUNT_CHUNK)
    counts = count_prompt(
        extras["counts"],
        jnp.where(reset == 1, row, -1)[None],
        jnp.where(tokens >= 0, row, -1),
        tokens,
        is_output == 1,
        vocab_offset=vocab_offset(extras["counts"].shape[1], axis_name),
    )
    return {
        "counts": counts,
        "adjust_ids": extras["adjust_ids"].at[row].set(ids),
        "adjust_values": extras["adjust_values"].at[row].set(jax.lax.bitcast_convert_type(values, jnp.float32)),
        "adjust_until": extras["adjust_until"].at[row].set(until),
    }


def params_of(rows: Rows, slot: Int[Array, " B"]) -> SamplerParams:
    """What the rows ask of the sampler, of the tokens after those that they have now."""
    ints, floats = rows["ints"][slot], rows["floats"][slot]
    return SamplerParams(
        temperature=floats[:, RowFloat.TEMPERATURE],
        top_k=ints[:, RowInt.TOP_K],
        top_p=floats[:, RowFloat.TOP_P],
        min_p=floats[:, RowFloat.MIN_P],
        key=jax.lax.bitcast_convert_type(ints[:, RowInt.KEY_LOW : RowInt.KEY_HIGH + 1], jnp.uint32),
        position=ints[:, RowInt.NUM_TOKENS],
        num_output=ints[:, RowInt.NUM_OUTPUT],
        repetition_penalty=floats[:, RowFloat.REPETITION],
        presence_penalty=floats[:, RowFloat.PRESENCE],
        frequency_penalty=floats[:, RowFloat.FREQUENCY],
    )


def advance(rows: Rows, slot: Int[Array, " B"], count: Int[Array, " B"], tokens: Int[Array, "steps B"]) -> Rows:
    """Remember the first `count` tokens of each row, whose keys and values are in the cache but for the last one's.

    The dummy row takes what padding drew and is never read for its value.
    """
    last = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[None], axis=0)[0]
    ints = rows["ints"][slot]
    ints = ints.at[:, RowInt.NUM_TOKENS].add(count).at[:, RowInt.NUM_OUTPUT].add(count)
    ints = ints.at[:, RowInt.LAST_TOKEN].set(last)
    return rows | {"ints": rows["ints"].at[slot].set(ints)}


def _remember(rows: Rows, slot: Int[Array, " B"], tokens: Int[Array, " B"]) -> Rows:
    """Remember one token a row, whose row has counted what is in the cache."""
    ints = rows["ints"].at[slot, RowInt.LAST_TOKEN].set(tokens).at[slot, RowInt.NUM_OUTPUT].add(1)
    return rows | {"ints": ints}
