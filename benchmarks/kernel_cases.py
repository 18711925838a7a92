"""What `kernels.py` measures: programs of several calls each, with what the calls move and compute.

Calls of one program read different memory wherever one call's would fit into the L2 cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tune_kernels

from nanovllm_kernels import (
    add_rms_norm,
    paged_decode,
    ragged_prefill,
    rope_cache_write,
    sample,
    sample_head,
    silu_mul,
)
from nanovllm_kernels._cases import AttentionCase, RowsCase
from nanovllm_kernels.rope_cache_write.cases import RopeCacheWriteCase
from nanovllm_kernels.sample.cases import SampleCase, sample_inputs
from nanovllm_kernels.sample_head.cases import SampleHeadCase, sample_head_inputs
from nanovllm_kernels.skinny_matmul.cases import SkinnyCase, product_of

ROTATED_BYTES = 300e6  # six times the L2 of an H100 or H200


@dataclass(frozen=True)
class Chain:
    """A program of `calls` calls in a row.

    Attributes:
        function: of arguments like `shapes`; the first `donated` are given away, and come back as its first results.
        fill: makes the arguments on the device.
        moved: bytes that a call needs to move.
        flops: floating-point operations of a call.
        times_itself: XLA times products while it compiles them, so nothing else may run on the device meanwhile.
    """

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    fill: Callable[[], tuple[Any, ...]]
    calls: int
    moved: float
    flops: float = 0.0
    donated: int = 0
    times_itself: bool = False

    def lower(self) -> jax.stages.Lowered:
        return jax.jit(self.function, donate_argnums=tuple(range(self.donated))).lower(*self.shapes)


def copy(num_bytes: int = 2**32) -> Chain:
    """A device copy, read and written: the ceiling of everything bound by memory."""
    fill = lambda: (jax.random.bits(jax.random.key(0), (num_bytes // 2,), jnp.uint16),)  # noqa: E731
    shapes = (jax.ShapeDtypeStruct((num_bytes // 2,), jnp.uint16),)
    return Chain("device copy", jnp.copy, shapes, fill, 1, 2 * num_bytes)


def product(size: int = 8192) -> Chain:
    """The largest bf16 product: the ceiling of everything bound by arithmetic."""
    shape = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    fill = lambda: (_normal(0, shape.shape), _normal(1, shape.shape))  # noqa: E731
    return Chain("bf16 product", jnp.dot, (shape, shape), fill, 1, 6 * size**2, 2 * size**3, times_itself=True)


def decode(case: AttentionCase) -> Chain:
    """Bytes are those of keys and values."""
    moved = 2 * sum(case.context_lens) * case.num_kv_heads * case.head_dim * _itemsize(case)
    copies = max(1, math.ceil(ROTATED_BYTES / moved)) if moved < ROTATED_BYTES else 1
    calls = max(6, copies)

    def function(q, k_cache, v_cache, tables, lens):
        for call in range(calls):
            q = paged_decode(q, k_cache, v_cache, tables[call % copies], lens, **case.options, backend="triton")
        return q

    flops = 4 * sum(case.context_lens) * case.num_heads * case.head_dim
    fill = partial(_paged, case, copies)
    return Chain(f"paged_decode {case.name}", function, jax.eval_shape(fill), fill, calls, moved, flops)


def prefill(case: AttentionCase, backend: str) -> Chain:
    """Operations are those of the keys that each query sees."""
    ends = np.cumsum([0, *case.q_lens])
    calls = 4

    def function(q, k_cache, v_cache, tables, lens):
        cu_q_lens = jnp.asarray(ends, jnp.int32)
        for _ in range(calls):
            q = ragged_prefill(q, k_cache, v_cache, tables[0], cu_q_lens, lens, **case.options, backend=backend)
        return q

    queries_and_outputs = 4 * sum(case.q_lens) * case.num_heads * case.head_dim
    moved = 2 * sum(case.context_lens) * case.num_kv_heads * case.head_dim * _itemsize(case) + queries_and_outputs
    pairs = sum(q * (context - (q - 1) / 2) for q, context in zip(case.q_lens, case.context_lens, strict=True))
    flops = 4 * pairs * case.num_heads * case.head_dim
    name = f"ragged_prefill {case.name}, {backend}"
    fill = partial(_paged, case, 1)
    return Chain(name, function, jax.eval_shape(fill), fill, calls, moved, flops)


def prefill_cudnn(case: AttentionCase) -> Chain:
    """The same over contiguous keys and values by cuDNN; of all keys, without a mask, where there is a prefix.

    cuDNN's causal mask through JAX is aligned to the start, so a prefix is compared by operations a second.
    """
    batch, new, context = len(case.q_lens), case.q_lens[0], case.context_lens[0]
    causal, calls = new == context, 4
    sizes = [(batch, new, case.num_heads, case.head_dim), *[(batch, context, case.num_kv_heads, case.head_dim)] * 2]

    def function(q, k, v):
        for _ in range(calls):
            q = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
        return q

    shapes = tuple(jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes)
    pairs = batch * new * (context - (new - 1) / 2 if causal else context)
    fill = lambda: tuple(_normal(seed, size) for seed, size in enumerate(sizes))  # noqa: E731
    moved = 2 * (2 * math.prod(sizes[0]) + 2 * math.prod(sizes[1]))
    flops = 4 * pairs * case.num_heads * case.head_dim
    return Chain(f"cuDNN {case.name}", function, shapes, fill, calls, moved, flops, times_itself=True)


def cache_write(case: RopeCacheWriteCase, backend: str) -> Chain:
    """Norm, rotation and write, caches donated, slots in random order and all different."""
    group, dtype = case.num_heads // case.num_kv_heads, jnp.dtype(case.dtype)
    num_blocks = 4 * case.num_tokens // case.block_size
    qkv_shape = (case.num_tokens, case.num_kv_heads, group + 2, case.head_dim)
    moved = 2 * dtype.itemsize * math.prod(qkv_shape) + 4 * case.num_tokens * case.head_dim
    calls = max(3, math.ceil(ROTATED_BYTES / moved))

    def function(k_cache, v_cache, qkv, cos, sin, norm, slots):
        queries = []
        for call in range(calls):
            q, k_cache, v_cache = rope_cache_write(
                qkv[call], cos, sin, k_cache, v_cache, slots[call], q_norm=norm, k_norm=norm, backend=backend
            )
            queries.append(q)
        return k_cache, v_cache, queries

    def fill():
        cache = jnp.zeros((num_blocks, case.num_kv_heads, case.block_size, case.head_dim), dtype)
        angles = jax.random.uniform(jax.random.key(1), (case.num_tokens, case.head_dim // 2), maxval=2 * jnp.pi)
        slots = [
            jax.random.permutation(jax.random.key(call), num_blocks * case.block_size)[: case.num_tokens]
            for call in range(calls)
        ]
        norm = jnp.ones(case.head_dim, dtype)
        slots = jnp.stack(slots).astype(jnp.int32)
        return cache, cache + 0, _normal(0, (calls, *qkv_shape)), jnp.cos(angles), jnp.sin(angles), norm, slots

    name = f"rope_cache_write {case.num_tokens} tokens, {backend}"
    return Chain(name, function, jax.eval_shape(fill), fill, calls, moved, donated=2)


def add_norm(case: RowsCase, backend: str) -> Chain:
    """Each call over rows of its own."""
    shape = (case.num_tokens, case.size)
    moved = 4 * jnp.dtype(case.dtype).itemsize * math.prod(shape)
    calls = max(2, math.ceil(ROTATED_BYTES / moved))

    def function(xs, updates, weight):
        pairs = zip(xs, updates, strict=True)
        return [add_rms_norm(x, update, weight, eps=1e-6, backend=backend) for x, update in pairs]

    def fill():
        xs, updates = ([_normal(seed + call, shape) for call in range(calls)] for seed in (0, calls))
        return xs, updates, jnp.ones(case.size, case.dtype)

    return Chain(f"add_rms_norm {case.name}, {backend}", function, jax.eval_shape(fill), fill, calls, moved)


def activation(case: RowsCase, backend: str) -> Chain:
    """Each call over gates and values of its own."""
    shape = (case.num_tokens, 2, case.size)
    moved = 3 * jnp.dtype(case.dtype).itemsize * case.num_tokens * case.size
    calls = max(2, math.ceil(ROTATED_BYTES / moved))
    function = lambda inputs: [silu_mul(gate_up, backend=backend) for gate_up in inputs]  # noqa: E731
    fill = lambda: ([_normal(call, shape) for call in range(calls)],)  # noqa: E731
    return Chain(f"silu_mul {case.name}, {backend}", function, jax.eval_shape(fill), fill, calls, moved)


def skinny(case: SkinnyCase, backend: str) -> Chain:
    """A product with what is before and after it, over copies of the weight; "xla": as a plain model has it."""

    def call(arrays, w, counters):
        if backend == "xla":
            return tune_kernels.xla_product(arrays, w)
        return product_of(arrays | {"w": w}, counters=counters, backend=backend)

    if backend != "xla":
        case = tune_kernels.in_the_engine(case)
    shapes = tune_kernels.shapes_of(case)
    moved = 2 * (math.prod(case.w_shape) + case.rows * (case.inputs + case.outputs * (1 + case.residual)))
    calls = len(shapes[1]) * tune_kernels.repeats(shapes[1])
    return Chain(
        f"skinny_matmul {case.name} {case.inputs} x {case.rows} rows, {backend}",
        tune_kernels.chain_of(call),
        shapes,
        partial(tune_kernels.device_arrays, case),
        calls,
        moved,
        2 * case.rows * math.prod(case.w_shape),
        times_itself=backend == "xla",
    )


def draw(case: SampleCase) -> Chain:
    """Sampling from normal logits, two or more sets of them."""
    copies = min(64, max(2, math.ceil(ROTATED_BYTES / case.read_bytes)))

    def function(logits, args, filters):
        return [sample(logits[call], *args, **filters, backend="triton") for call in range(copies)]

    def fill():
        (logits, *args), filters = sample_inputs(replace(case, vocab_size=1))
        logits = jax.random.normal(jax.random.key(0), (copies, case.num_rows, case.vocab_size))
        return logits, jax.device_put(tuple(args)), jax.device_put(filters)

    return Chain(f"sample {case.name}", function, jax.eval_shape(fill), fill, copies, case.read_bytes)


def draw_from_head(case: SampleHeadCase) -> Chain:
    """Hidden states of each call's own; one head, which alone is as much as all copies of other chains."""
    calls = max(4, math.ceil(ROTATED_BYTES / case.read_bytes))

    def function(hidden, head, args):
        return [sample_head(hidden[call], head, *args, backend="triton") for call in range(calls)]

    def fill():
        _, _, *args = sample_head_inputs(replace(case, vocab_size=1))
        hidden = _normal(0, (calls, case.num_rows, case.inputs))
        head = _normal(1, (case.vocab_size, case.inputs)) * jnp.asarray(case.inputs**-0.5, jnp.bfloat16)
        return hidden, head, jax.device_put(tuple(args))

    flops = 2 * case.num_rows * case.inputs * case.vocab_size
    shapes = jax.eval_shape(fill)
    return Chain(f"sample_head {case.name}", function, shapes, fill, calls, case.read_bytes, flops)


def _normal(seed: int, shape: tuple[int, ...]):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _itemsize(case: AttentionCase) -> int:
    return jnp.dtype(case.cache_dtype or case.dtype).itemsize


def _paged(case: AttentionCase, copies: int) -> tuple[Any, ...]:
    """q, caches, a block table a copy, lengths; blocks of each copy are its own, in random order."""
    blocks = np.array([math.ceil(length / case.block_size) for length in case.context_lens])
    tables = np.zeros((copies, len(blocks), blocks.max()), np.int32)
    order = np.random.default_rng(0).permutation(copies * blocks.sum())
    used = np.broadcast_to(np.arange(blocks.max()) < blocks[:, None], tables.shape)
    tables[used] = order
    shape = (len(order), case.num_kv_heads, case.block_size, case.head_dim)
    k_cache, v_cache = (_normal(seed, shape).astype(case.cache_dtype or case.dtype) for seed in (1, 2))
    q = _normal(0, (case.num_tokens, case.num_heads, case.head_dim))
    return q, k_cache, v_cache, jnp.asarray(tables), jnp.asarray(case.context_lens, jnp.int32)
