"""Every program the engine can run, compiled ahead of time from abstract shapes.

A program is named by a `ProgramKey`; `Programs.all_keys()` is the whole list, so after `compile_all()` nothing
compiles any more.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from nanovllm_jax.models.params import Params
from nanovllm_jax.step import draw
from nanovllm_jax.step.admission import UPDATE_LENGTH, update_rows
from nanovllm_jax.step.state import PrefillDelta, abstract_caches, abstract_extras, abstract_rows
from nanovllm_jax.step.step import StepConfig, decode_forward, prefill_forward

logger = logging.getLogger(__name__)

CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"
_cache_hits: Counter[int] = Counter()  # by thread: compilation reports its hits on the thread that asked


def _count_cache_hit(event: str, **_: Any) -> None:
    if event == CACHE_HIT_EVENT:
        _cache_hits[threading.get_ident()] += 1


jax.monitoring.register_event_listener(_count_cache_hit)


def use_persistent_cache() -> Path:
    """Keep compiled programs in the user's cache folder, unless JAX is already told where to keep them."""
    if jax.config.jax_compilation_cache_dir is not None:
        return Path(jax.config.jax_compilation_cache_dir)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm-jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


class ProgramKey(NamedTuple):
    """What a program does and the bucket it is for (rows or tokens; 0 where it has one size)."""

    kind: str  # decode, prefill, plain, filtered, full, prompt_logprobs, update_rows, update_extras
    size: int = 0


@dataclass(frozen=True)
class CompileRecord:
    """One compilation: what, how long (seconds), and whether the persistent cache had it."""

    key: ProgramKey
    lower_s: float
    compile_s: float
    cache_hit: bool


class Programs:
    """Compiles programs and keeps them.

    Args:
        config: static part of the step.
        params: weights, or their abstract values with shardings.
        cache_dtype: of K and V.
        sharding: of everything that is not a parameter.
        decode_sizes: row buckets.
        prefill_sizes: token buckets.
        num_logprobs: most log-probabilities a token that a request can ask for.
        command_buffers: whether XLA may record its launches (on GPUs).
    """

    def __init__(
        self,
        config: StepConfig,
        params: Params,
        cache_dtype: Any,
        sharding: Sharding,
        *,
        decode_sizes: Sequence[int],
        prefill_sizes: Sequence[int],
        num_logprobs: int,
        command_buffers: bool,
    ) -> None:
        self.config, self.num_logprobs = config, num_logprobs
        self.decode_sizes, self.prefill_sizes = decode_sizes, prefill_sizes
        self.compile_log: list[CompileRecord] = []
        self._options = {} if command_buffers else {"xla_gpu_enable_command_buffer": ""}
        self._compiled: dict[ProgramKey, jax.stages.Compiled] = {}

        def abstract(tree: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

        self._array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        self._params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        self._caches = abstract(abstract_caches(config.model, config.shape, cache_dtype))
        self._rows = abstract(abstract_rows(config.shape))
        self._extras = abstract(abstract_extras(config.model, config.shape))

    def all_keys(self) -> list[ProgramKey]:
        """Every program, those that take longest to compile first."""
        keys = [ProgramKey("prefill", size) for size in reversed(self.prefill_sizes)]
        keys += [ProgramKey("decode", size) for size in reversed(self.decode_sizes)]
        for kind in ("full", "filtered", "plain"):
            keys += [ProgramKey(kind, size) for size in reversed(self.decode_sizes)]
        keys += [ProgramKey("prompt_logprobs", size) for size in reversed(self.prefill_sizes)]
        return [*keys, ProgramKey("update_rows"), ProgramKey("update_extras")]

    def __getitem__(self, key: ProgramKey) -> jax.stages.Compiled:
        """The compiled program; compiles it now if it is not yet there."""
        if key not in self._compiled:
            lowered, seconds = self._lower(key)
            self._finish(key, lowered, seconds)
        return self._compiled[key]

    def compile_all(self) -> None:
        """Compile every program: lowered one after the other (Python), compiled side by side (XLA)."""
        missing = [key for key in self.all_keys() if key not in self._compiled]
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            pending = [pool.submit(self._finish, key, *self._lower(key)) for key in missing]
            for future in pending:
                future.result()

    def trace(self, key: ProgramKey) -> jax.stages.Traced:
        """The program before lowering, to look into it or to lower it for another platform."""
        function, arguments, donated = self._describe(key)
        return jax.jit(function, donate_argnums=donated).trace(*arguments)

    def _lower(self, key: ProgramKey) -> tuple[jax.stages.Lowered, float]:
        start = time.perf_counter()
        lowered = self.trace(key).lower()
        return lowered, time.perf_counter() - start

    def _finish(self, key: ProgramKey, lowered: jax.stages.Lowered, lower_s: float) -> None:
        start, hits = time.perf_counter(), _cache_hits[threading.get_ident()]
        on_gpu = self.config.backend == "triton"
        self._compiled[key] = lowered.compile(compiler_options=self._options if on_gpu else None)
        hit = _cache_hits[threading.get_ident()] > hits
        record = CompileRecord(key, lower_s, time.perf_counter() - start, hit)
        self.compile_log.append(record)
        logger.debug("compiled %s", record)

    def _describe(self, key: ProgramKey) -> tuple[Any, tuple[Any, ...], tuple[int, ...]]:
        """(function of arrays alone, its abstract arguments, which of them are donated)."""
        config, array = self.config, self._array
        slots, width = config.shape.max_num_seqs, config.model.hidden_size
        head = head_of(self._params)
        dtype = self._params["embed"].dtype
        last = (array((slots, width), dtype), array((slots,), jnp.int32))
        M = config.shape.max_adjustments
        match key.kind:
            case "decode":
                arguments = (self._params, self._caches, self._rows, array((2, key.size), jnp.int32))
                return partial(decode_forward, config), arguments, (1, 2)
            case "prefill":
                layout = PrefillDelta(key.size, slots)
                arguments = (self._params, self._caches, self._rows, array((layout.length,), jnp.int32))
                return partial(prefill_forward, config, layout), arguments, (1, 2)
            case "plain" | "filtered":
                return partial(draw.draw, key.kind, key.size), (head, self._rows, *last), (1,)
            case "full":
                function = partial(draw.draw_full, key.size, self.num_logprobs)
                return function, (head, self._rows, self._extras, *last), (1, 2)
            case "prompt_logprobs":
                arguments = (head, array((key.size, width), dtype), array((key.size,), jnp.int32))
                return partial(draw.prompt_logprobs, self.num_logprobs), arguments, ()
            case "update_rows":
                return update_rows, (self._rows, array((UPDATE_LENGTH,), jnp.int32)), (0,)
            case "update_extras":
                length = draw.extras_update_length(M)
                return partial(draw.update_extras, M), (self._extras, array((length,), jnp.int32)), (0,)
            case _:
                raise KeyError(key)


def head_of(params: Params) -> Params:
    """The part of the parameters that the logits need."""
    name = "lm_head" if "lm_head" in params else "embed"
    return {name: params[name]}
