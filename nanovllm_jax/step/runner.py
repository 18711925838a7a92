"""Drives the device: sends each schedule down as a packed delta, and reads what was sampled one step later.

`dispatch` only enqueues work. `read` waits for a step's tokens; calling it after the next `dispatch` hides host work
behind the device's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanovllm_jax.engine.request import Request
from nanovllm_jax.engine.sampling_plan import Adjustment
from nanovllm_jax.engine.schedule import Schedule, ScheduledSequence
from nanovllm_jax.models.params import Params
from nanovllm_jax.parallel.collectives import check_exchange
from nanovllm_jax.step import draw
from nanovllm_jax.step.admission import Admission, TableSpan, pack_updates
from nanovllm_jax.step.buckets import bucket_for
from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_jax.step.decode import no_decodes
from nanovllm_jax.step.programs import Programs
from nanovllm_jax.step.result import StepResult, TokenLogprobs
from nanovllm_jax.step.state import PrefillDelta

_UNREAD = array("i", [-1])
_SAMPLING_STEPS = ("decode", "decode_filtered")


@dataclass
class InFlight:
    """A dispatched step: its schedule and the device arrays to come."""

    schedule: Schedule
    tokens: jax.Array  # [B], or [steps, B]
    logprobs: tuple[jax.Array, ...] | None
    prompt_logprobs: tuple[jax.Array, ...] | None

    @property
    def is_ready(self) -> bool:
        """Whether the device has done it."""
        return self.tokens.is_ready()  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class _Row:
    """What the device knows of a row slot."""

    has_extras: bool = False  # biases, bans or counts that the next owner must not inherit
    bans: tuple[Adjustment, ...] = field(default=())


class Runner:
    """Holds the device state of one engine.

    Args:
        programs: what it runs.
        params: weights on the devices.
    """

    def __init__(self, programs: Programs, params: Params) -> None:
        self.programs, self._config = programs, programs.catalogue.config
        self._params, self._head, self._tail = params, draw.head_of(params), draw.tail_of(params)
        self._caches = _zeros(programs.catalogue.caches)
        self._device_rows = _zeros(programs.catalogue.rows)
        self._extras = None
        self._rows = [_Row() for _ in range(self._config.shape.max_num_seqs)]
        self._blocks_sent = [0] * self._config.shape.max_num_seqs  # of each row slot's table

    def dispatch(self, schedule: Schedule) -> InFlight:
        """Enqueue one step. Order on the device is the order of these calls."""
        sequences = schedule.sequences
        prompt = logprobs = None
        key = self.step_key(schedule)
        if key.kind in _SAMPLING_STEPS:
            tokens = self._decode(key, sequences)
        else:
            if key.kind == "decode_forward":
                hidden, sampled_rows = self._decode_forward(key, sequences)
            else:
                hidden, sampled_rows, prompt = self._prefill(key, sequences)
            tokens, logprobs = self._draw(sequences, hidden, sampled_rows)
        for result in (tokens, *(logprobs or ()), *(prompt or ())):
            result.copy_to_host_async()
        return InFlight(schedule, tokens, logprobs, prompt)

    def compile(self, schedule: Schedule) -> None:
        """Have the programs of a step. They compile in another thread: Ctrl-C ends the wait alone."""
        for key in self._keys(schedule):
            self.programs.have(key)

    def warm_up(self) -> None:
        """Run each step once on padding, so that modules load before the first request."""
        catalogue = self.programs.catalogue
        for size in catalogue.prefill_sizes:
            delta = PrefillDelta(size, self._config.shape.max_num_seqs).pack([], [], [], [], [])
            step = self.programs[ProgramKey("prefill", size)]
            self._caches, self._device_rows, *_ = step(self._params, self._caches, self._device_rows, delta)
        for kind, sizes in (("decode", catalogue.decode_sizes), ("decode_filtered", catalogue.filtered_sizes)):
            for size in sizes:
                step = self.programs[ProgramKey(kind, size)]
                self._caches, self._device_rows, _ = step(
                    self._params, self._caches, self._device_rows, no_decodes(size)
                )
        for size in catalogue.sampling_sizes:
            step = self.programs[ProgramKey("decode_forward", size)]
            self._caches, self._device_rows, hidden, sampled_rows = step(
                self._params, self._caches, self._device_rows, no_decodes(size)
            )
            for kind in ("plain", "filtered"):
                draw_one = self.programs[ProgramKey(kind, size)]
                self._device_rows, _ = draw_one(self._head, self._device_rows, hidden, sampled_rows)
        jax.block_until_ready(self._device_rows)

    def read(self, step: InFlight) -> StepResult:
        """Wait for a step and return what it sampled."""
        sequences = step.schedule.sequences
        step.tokens.block_until_ready()  # looks for signals while it waits, which the conversion does not
        by_step = np.atleast_2d(np.asarray(step.tokens))
        tokens = by_step[:, : len(sequences)].T.tolist()
        for index, s in enumerate(sequences):
            count = s.num_tokens if s.is_decode else int(s.samples)
            if count < len(by_step):
                del tokens[index][count:]
        logprobs = _split_logprobs(step.logprobs, len(sequences)) if step.logprobs else None
        prompt: dict[Request, list[TokenLogprobs]] = {}
        if step.prompt_logprobs:
            flat = _split_logprobs(step.prompt_logprobs, sum(s.num_tokens for s in sequences))
            start = 0
            for sequence in sequences:
                if sequence.request.skip_prefix_cache_read:
                    prompt[sequence.request] = flat[start : start + sequence.num_tokens]
                start += sequence.num_tokens
        return StepResult(tokens, logprobs, prompt)

    def check_sums(self) -> None:
        """Wait for the devices, and find out whether shards still add.

        Raises:
            DeviceError: if one has waited in vain for another, in this step or an earlier one.
        """
        check_exchange(self._params)

    def close(self) -> None:
        """Give the device memory back at once."""
        for leaf in jax.tree.leaves((self._params, self._caches, self._device_rows, self._extras)):
            if not leaf.is_deleted():
                leaf.delete()

    def step_key(self, schedule: Schedule) -> ProgramKey:
        """The program that runs the model in a step."""
        sequences, catalogue = schedule.sequences, self.programs.catalogue
        if not schedule.is_decode:
            num_tokens = sum(s.num_tokens for s in sequences)
            return ProgramKey("prefill", bucket_for(num_tokens, catalogue.prefill_sizes))
        variants = {s.request.plan.variant for s in sequences}
        kind, sizes = "decode_forward", catalogue.sampling_sizes
        if self._runs_in_one_program(sequences, variants):
            filtered = "filtered" in variants
            kind = "decode_filtered" if filtered else "decode"
            sizes = catalogue.filtered_sizes if filtered else catalogue.decode_sizes
        return ProgramKey(kind, bucket_for(len(sequences), sizes))

    def _keys(self, schedule: Schedule) -> list[ProgramKey]:
        """The programs that `dispatch` is about to call, but those of biases and bans."""
        sequences, step = schedule.sequences, self.step_key(schedule)
        if step.kind in _SAMPLING_STEPS:
            return [step]
        if step.kind == "decode_forward":
            return [step, self._draw_key(sequences)]
        keys = [ProgramKey("update_rows"), step, self._draw_key(sequences)]
        if any(s.request.skip_prefix_cache_read for s in sequences):
            keys.append(ProgramKey("prompt_logprobs", step.size))
        return keys

    def _draw_key(self, sequences: Sequence[ScheduledSequence]) -> ProgramKey:
        variants = {s.request.plan.variant for s in sequences if s.samples}
        kind = next((kind for kind in ("full", "filtered") if kind in variants), "plain")
        return ProgramKey(kind, bucket_for(len(sequences), self.programs.catalogue.sampling_sizes))

    def _runs_in_one_program(self, sequences: Sequence[ScheduledSequence], variants: set[str]) -> bool:
        """Whether the decode program samples all that the rows ask for, and has more than one token to compute."""
        worth_it = self._config.decode_steps == 1 or any(s.num_tokens > 1 for s in sequences)
        return worth_it and "full" not in variants

    def _decode(self, key: ProgramKey, sequences: Sequence[ScheduledSequence]) -> jax.Array:
        step, delta = self.programs[key], self._decode_delta(sequences, key.size)
        self._caches, self._device_rows, tokens = step(self._params, self._caches, self._device_rows, delta)
        return tokens

    def _decode_forward(self, key: ProgramKey, sequences: Sequence[ScheduledSequence]) -> tuple[jax.Array, jax.Array]:
        self._update_bans(sequences)
        step, delta = self.programs[key], self._decode_delta(sequences, key.size)
        self._caches, self._device_rows, hidden, sampled_rows = step(
            self._params, self._caches, self._device_rows, delta
        )
        return hidden, sampled_rows

    def _decode_delta(self, sequences: Sequence[ScheduledSequence], size: int) -> np.ndarray:
        """[3, size] int32: row slots, the blocks that they open, and how many tokens each computes."""
        delta, count = no_decodes(size), len(sequences)
        slots = [sequence.request.row for sequence in sequences]
        delta[0, :count] = slots
        delta[2, :count] = [sequence.num_tokens for sequence in sequences]
        blocks_sent = self._blocks_sent
        for i, (slot, sequence) in enumerate(zip(slots, sequences, strict=True)):
            if len(sequence.block_ids) > blocks_sent[slot]:
                delta[1, i] = sequence.block_ids[-1]
                blocks_sent[slot] += 1
        return delta

    def _prefill(
        self, key: ProgramKey, sequences: Sequence[ScheduledSequence]
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...] | None]:
        self._send_rows(sequences)
        self._update_bans(sequences)
        layout = PrefillDelta(key.size, self._config.shape.max_num_seqs)
        # A decode's token may only be known on the device yet.
        tokens = [_UNREAD if s.is_decode else s.request.token_ids[s.start : s.start + s.num_tokens] for s in sequences]
        delta = layout.pack(
            np.concatenate(tokens),
            [s.num_tokens for s in sequences],
            [s.request.row for s in sequences],
            [s.start for s in sequences],
            [s.samples for s in sequences],
        )
        self._caches, self._device_rows, hidden, sampled_rows, unfinished = self.programs[key](
            self._params, self._caches, self._device_rows, delta
        )
        prompt = None
        if any(s.request.skip_prefix_cache_read for s in sequences):
            targets = np.zeros(key.size, np.int32)
            start = 0
            for s in sequences:
                following = s.request.token_ids[s.start + 1 : s.start + 1 + s.num_tokens]
                targets[start : start + len(following)] = following
                start += s.num_tokens
            prompt = self.programs[ProgramKey("prompt_logprobs", key.size)](self._tail, unfinished, targets)
        return hidden, sampled_rows, prompt

    def _draw(
        self, sequences: Sequence[ScheduledSequence], hidden: jax.Array, sampled_rows: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
        key = self._draw_key(sequences)
        if key.kind != "full":
            self._device_rows, tokens = self.programs[key](self._head, self._device_rows, hidden, sampled_rows)
            return tokens, None
        self._device_rows, self._extras, sampled = self.programs[key](
            self._head, self._device_rows, self._extras, hidden, sampled_rows
        )
        wanted = any(s.request.params.logprobs is not None for s in sequences)
        return sampled.tokens, tuple(sampled[1:]) if wanted else None

    def _send_rows(self, sequences: Sequence[ScheduledSequence]) -> None:
        """Send down what the device does not know yet: admitted rows and the blocks of every row."""
        admissions: list[Admission] = []
        spans: list[TableSpan] = []
        for sequence in sequences:
            request = sequence.request
            row, blocks_sent = self._rows[request.row], self._blocks_sent[request.row]
            if sequence.is_admitted:
                blocks_sent = 0
                last_token, num_output = request.token_ids[-1], len(request.output_token_ids)
                ints = (sequence.start, last_token, num_output, request.plan.top_k, *request.plan.key)
                admissions.append((request.row, ints, request.plan.floats))
                if request.plan.variant == "full" or row.has_extras:
                    row.bans = request.plan.bans_after(request.output_token_ids)
                    self._send_extras(request, row.bans, count=True)
                    row.has_extras = request.plan.variant == "full"
            if len(request.block_ids) > blocks_sent:
                spans.append((request.row, blocks_sent, request.block_ids[blocks_sent:]))
            self._blocks_sent[request.row] = len(request.block_ids)
        for packed in pack_updates(admissions, spans):
            self._device_rows = self.programs[ProgramKey("update_rows")](self._device_rows, packed)

    def _update_bans(self, sequences: Sequence[ScheduledSequence]) -> None:
        """Bad words of several tokens: ban what would complete one after the tokens known so far."""
        for sequence in sequences:
            plan = sequence.request.plan
            if plan.bad_words and sequence.samples:
                bans = plan.bans_after(sequence.request.output_token_ids)
                row = self._rows[sequence.request.row]
                if bans != row.bans:
                    row.bans = bans
                    self._send_extras(sequence.request, bans, count=False)

    def _send_extras(self, request: Request, bans: tuple[Adjustment, ...], *, count: bool) -> None:
        if self._extras is None:
            # From the host, since nothing may compile here.
            self._extras = jax.tree.map(
                lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), self.programs.catalogue.extras
            )
        M, chunk = self._config.shape.max_adjustments, draw.COUNT_CHUNK
        known = np.array(request.token_ids if count else [], np.int32)
        for start in range(0, max(len(known), 1), chunk):
            packed = np.full(draw.extras_update_length(M), -1, np.int32)
            packed[0], packed[1] = request.row, int(count and start == 0)
            ids, values, until = packed[2 : 2 + 3 * M].reshape(3, M)
            entries = (*request.plan.adjustments, *bans)
            if entries:
                ids[: len(entries)] = [e[0] for e in entries]
                values[: len(entries)] = np.array([e[1] for e in entries], np.float32).view(np.int32)
                until[: len(entries)] = [e[2] for e in entries]
            tokens, is_output = packed[2 + 3 * M :].reshape(2, chunk)
            some = known[start : start + chunk]
            tokens[: len(some)] = some
            is_output[: len(some)] = np.arange(start, start + len(some)) >= request.num_prompt_tokens
            self._extras = self.programs[ProgramKey("update_extras")](self._extras, packed)


def _zeros(abstract: Any) -> Any:
    """Arrays made on the devices: the cache does not fit the host."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    make = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract), out_shardings=shardings)
    return make()


def _split_logprobs(arrays: tuple[jax.Array, ...], count: int) -> list[TokenLogprobs]:
    logprobs, ranks, top_ids, top_logprobs = (np.asarray(array)[:count] for array in arrays)
    return [
        TokenLogprobs(float(lp), int(rank), ids, top)
        for lp, rank, ids, top in zip(logprobs, ranks, top_ids, top_logprobs, strict=True)
    ]
