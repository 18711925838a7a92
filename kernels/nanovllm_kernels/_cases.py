"""Problems in NumPy that tests and benchmarks share. In attention's everything that a kernel must not read is NaN."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}


@dataclass(frozen=True)
class RowsCase:
    """One problem of an operation on rows of `size` elements."""

    name: str
    num_tokens: int
    size: int
    dtype: str = "bfloat16"


def kv_scales(cache_dtype: str, num_kv_heads: int, rng: np.random.Generator) -> dict[str, Any]:
    """`k_scale` and `v_scale` of a float8 cache, different for each KV head; nothing for other caches."""
    if cache_dtype != "float8_e4m3fn":
        return {}
    k_scale, v_scale = rng.uniform(0.5, 2.0, (2, num_kv_heads)).astype(np.float32)
    return {"k_scale": jnp.asarray(k_scale), "v_scale": jnp.asarray(v_scale)}


@dataclass(frozen=True)
class AttentionCase:
    """One problem. `q_lens` None means decode: one query a row; `padding` rows of q belong to nobody."""

    name: str
    context_lens: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: str = "bfloat16"
    q_lens: tuple[int, ...] | None = None
    padding: int = 0
    sliding_window: int | None = None
    soft_cap: float | None = None
    cache_dtype: str | None = None  # None means dtype
    num_queries: int | None = None  # decode: Q queries a row; None means q without that dimension

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the operation."""
        options = {"scale": self.head_dim**-0.5, "sliding_window": self.sliding_window, "soft_cap": self.soft_cap}
        return options | kv_scales(self.cache_dtype or self.dtype, self.num_kv_heads, np.random.default_rng(7))

    @property
    def num_tokens(self) -> int:
        """T: rows of q, padding included."""
        return self.padding + (len(self.context_lens) if self.q_lens is None else sum(self.q_lens))


@dataclass(frozen=True)
class PagedInputs:
    """Arrays of an `AttentionCase`; `args` are the operation's positional arguments."""

    q: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    block_tables: np.ndarray
    context_lens: np.ndarray
    cu_q_lens: np.ndarray | None = field(default=None)

    @property
    def args(self) -> tuple[np.ndarray, ...]:
        """In the operation's order."""
        paged = (self.q, self.k_cache, self.v_cache, self.block_tables)
        return (*paged, self.context_lens) if self.cu_q_lens is None else (*paged, self.cu_q_lens, self.context_lens)


def attention_inputs(
    case: AttentionCase, seed: int = 0, *, num_blocks: int | None = None, table_width: int | None = None
) -> PagedInputs:
    """Random inputs: blocks in random order, NaN in every slot past a context, junk past a block table.

    `num_blocks` and `table_width` fix the shapes where the lengths vary; None takes what the lengths need and
    a little more.

    Large values in q spread the softmax, so that a wrong position shows.
    """
    rng = np.random.default_rng(seed)
    dtype, cache_dtype = DTYPES[case.dtype], DTYPES[case.cache_dtype or case.dtype]
    blocks_of = [-(-length // case.block_size) for length in case.context_lens]
    num_blocks = num_blocks or sum(blocks_of) + 3
    table_width = table_width or max(1, *blocks_of) + 2
    cache_shape = (num_blocks, case.num_kv_heads, case.block_size, case.head_dim)
    k_cache, v_cache = np.full((2, *cache_shape), np.nan, np.float32)
    free = rng.permutation(num_blocks)
    # What is past the needed blocks is not a block number at all.
    junk = np.array([-1, -(2**31), 2**31 - 1, num_blocks])
    tables = rng.choice(junk, size=(len(blocks_of), table_width))
    for row, (length, count) in enumerate(zip(case.context_lens, blocks_of, strict=True)):
        tables[row, :count], free = free[:count], free[count:]
        for cache in (k_cache, v_cache):
            values = rng.standard_normal((length, case.num_kv_heads, case.head_dim), np.float32)
            for start in range(0, length, case.block_size):
                page = values[start : start + case.block_size].swapaxes(0, 1)
                cache[tables[row, start // case.block_size], :, : page.shape[1]] = page
    queries = () if case.num_queries is None else (case.num_queries,)
    q = 2 * rng.standard_normal((case.num_tokens, *queries, case.num_heads, case.head_dim), np.float32)
    cu_q_lens = None
    if case.q_lens is not None:
        cu_q_lens = np.concatenate([[0], np.cumsum(case.q_lens)]).astype(np.int32)
        q[cu_q_lens[-1] :] = np.nan
    return PagedInputs(
        q=q.astype(dtype),
        k_cache=k_cache.astype(cache_dtype),
        v_cache=v_cache.astype(cache_dtype),
        block_tables=tables.astype(np.int32),
        context_lens=np.array(case.context_lens, np.int32),
        cu_q_lens=cu_q_lens,
    )
