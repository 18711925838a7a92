"""Every program the engine can run, described by abstract shapes; `programs.py` compiles them.

On several devices each program is wrapped in `shard_map` over the mesh: the functions of the step then see their
device's part of the weights, the cache and the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanovllm_jax.models.params import Params
from nanovllm_jax.models.transformer import Unfinished
from nanovllm_jax.parallel.mesh import MODEL_AXIS
from nanovllm_jax.step import draw
from nanovllm_jax.step.admission import UPDATE_LENGTH, update_rows
from nanovllm_jax.step.decode import decode, decode_forward
from nanovllm_jax.step.prefill import prefill_forward
from nanovllm_jax.step.state import (
    CACHE_SPEC,
    EXTRAS_SPECS,
    PrefillDelta,
    abstract_caches,
    abstract_extras,
    abstract_rows,
)
from nanovllm_jax.step.step import StepConfig

EQUAL = PartitionSpec()  # the same on every device
UNFINISHED_SPECS = Unfinished(x=EQUAL, heads=PartitionSpec(None, MODEL_AXIS))  # heads by KV head


class ProgramKey(NamedTuple):
    """What a program does and the bucket it is for (rows or tokens; 0 where it has one size)."""

    kind: str  # decode, decode_filtered, decode_forward, prefill, plain, filtered, full, prompt_logprobs, update_...
    size: int = 0

    @property
    def cost(self) -> float:
        """About how many seconds it takes to compile on a busy machine, kernels included that its neighbours share."""
        many_rows = self.size > 16  # whose products are Mosaic's: each takes a second or two to lower and compile
        match self.kind:
            case "decode" | "decode_forward":
                return 9.0 if many_rows else 5.0
            case "decode_filtered":
                return 14.0 if many_rows else 7.0
            case "prefill":
                return 6.0
            case "full":
                return 3.0
            case "prompt_logprobs":
                return 2.0
            case _:
                return 0.4


@dataclass(frozen=True)
class Program:
    """A function of arrays alone, its abstract arguments, which of them are donated, and how its results are split."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]
    out_specs: Any


class Catalogue:
    """The programs of one engine.

    Args:
        config: static part of the step; its `axis_name` says whether the model is split over the mesh.
        params: weights, or their abstract values with shardings.
        cache_dtype: of K and V.
        mesh: the devices.
        decode_sizes: row buckets of decode steps.
        filtered_sizes: row buckets of decode steps in which a row has top-k, top-p or min-p.
        sampling_sizes: row buckets of what samples apart from the step; fewer, since those programs run less often.
        prefill_sizes: token buckets.
        num_logprobs: most log-probabilities a token that a request can ask for.
    """

    def __init__(
        self,
        config: StepConfig,
        params: Params,
        cache_dtype: Any,
        mesh: Mesh,
        *,
        decode_sizes: Sequence[int],
        filtered_sizes: Sequence[int],
        sampling_sizes: Sequence[int],
        prefill_sizes: Sequence[int],
        num_logprobs: int,
    ) -> None:
        self.config, self.mesh, self.num_logprobs = config, mesh, num_logprobs
        self.decode_sizes, self.filtered_sizes = decode_sizes, filtered_sizes
        self.sampling_sizes, self.prefill_sizes = sampling_sizes, prefill_sizes
        self.params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        self.cache_dtype = jnp.dtype(cache_dtype)
        as_bytes = config.backend == "xla"
        self.caches = abstract_caches(config.model, config.shape, cache_dtype, mesh, as_bytes=as_bytes)
        self.rows = abstract_rows(config.shape, mesh)
        self.extras = abstract_extras(config.model, config.shape, mesh)

    def all_keys(self) -> list[ProgramKey]:
        """Every program, those that take longest to compile first, and beside each other those that share kernels."""
        keys = [ProgramKey("prefill", size) for size in reversed(self.prefill_sizes)]
        keys += [ProgramKey("decode", size) for size in reversed(self.decode_sizes)]
        keys += [ProgramKey("decode_forward", size) for size in reversed(self.sampling_sizes)]
        keys += [ProgramKey("decode_filtered", size) for size in reversed(self.filtered_sizes)]
        for kind in ("full", "filtered", "plain"):
            keys += [ProgramKey(kind, size) for size in reversed(self.sampling_sizes)]
        keys += [ProgramKey("prompt_logprobs", size) for size in reversed(self.prefill_sizes)]
        return [*keys, ProgramKey("update_rows"), ProgramKey("update_extras")]

    def trace(self, key: ProgramKey) -> jax.stages.Traced:
        """The program before lowering, to compile it or to look into it."""
        return self._jitted(key).trace(*self.describe(key).arguments)

    def _jitted(self, key: ProgramKey) -> Any:
        program = self.describe(key)
        # A new function each time: JAX would give back what it compiled for an equal catalogue, which may have come
        # from XLA's cache and does then not serialise whole.
        function = partial(program.function)
        if self.config.axis_name is not None:
            in_specs = jax.tree.map(lambda x: x.sharding.spec, program.arguments)
            # Results that are equal on every device are so by construction, which the check cannot see.
            function = jax.shard_map(
                function, mesh=self.mesh, in_specs=in_specs, out_specs=program.out_specs, check_vma=False
            )
        return jax.jit(function, donate_argnums=program.donated)

    def describe(self, key: ProgramKey) -> Program:
        """What a key stands for."""
        config, axis_name = self.config, self.config.axis_name
        slots, width, M = config.shape.max_num_seqs, config.model.hidden_size, config.shape.max_adjustments
        head, dtype = draw.head_of(self.params), self.params["embed"].dtype
        last = (self._array((slots, width), dtype), self._array((slots,)))
        match key.kind:
            case "decode" | "decode_filtered":
                variant = "plain" if key.kind == "decode" else "filtered"
                arguments = (self.params, self.caches, self.rows, self._array((3, key.size)))
                return Program(partial(decode, config, variant), arguments, (1, 2), (CACHE_SPEC, EQUAL, EQUAL))
            case "decode_forward":
                arguments = (self.params, self.caches, self.rows, self._array((3, key.size)))
                return Program(partial(decode_forward, config), arguments, (1, 2), (CACHE_SPEC, EQUAL, EQUAL, EQUAL))
            case "prefill":
                layout = PrefillDelta(key.size, slots)
                arguments = (self.params, self.caches, self.rows, self._array((layout.length,)))
                out_specs = (CACHE_SPEC, EQUAL, EQUAL, EQUAL, UNFINISHED_SPECS)
                return Program(partial(prefill_forward, config, layout), arguments, (1, 2), out_specs)
            case "plain" | "filtered":
                function = partial(draw.draw, key.kind, key.size, axis_name, config.backend)
                return Program(function, (head, self.rows, *last), (1,), EQUAL)
            case "full":
                function = partial(draw.draw_full, key.size, self.num_logprobs, axis_name, config.backend)
                return Program(function, (head, self.rows, self.extras, *last), (1, 2), (EQUAL, EXTRAS_SPECS, EQUAL))
            case "prompt_logprobs":
                arguments = (draw.tail_of(self.params), self._unfinished(key.size), self._array((key.size,)))
                function = partial(draw.prompt_logprobs, config.model, self.num_logprobs, axis_name, config.backend)
                return Program(function, arguments, (), EQUAL)
            case "update_rows":
                return Program(update_rows, (self.rows, self._array((UPDATE_LENGTH,))), (0,), EQUAL)
            case "update_extras":
                arguments = (self.extras, self._array((draw.extras_update_length(M),)))
                return Program(partial(draw.update_extras, M, axis_name), arguments, (0,), EXTRAS_SPECS)
            case _:
                raise KeyError(key)

    def _unfinished(self, num_tokens: int) -> Unfinished:
        model, dtype = self.config.model, self.params["embed"].dtype
        sharding = NamedSharding(self.mesh, UNFINISHED_SPECS.heads)
        heads = (num_tokens, model.num_kv_heads, model.group_size, model.head_dim)
        x = self._array((num_tokens, model.hidden_size), dtype)
        return Unfinished(x, jax.ShapeDtypeStruct(heads, dtype, sharding=sharding))

    def _array(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, EQUAL))
