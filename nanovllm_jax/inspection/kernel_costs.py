"""What each kernel must compute and move, in closed form, since XLA sees nothing inside a custom call.

The formulas count each operand once: a key or value that several tiles read comes from the GPU's L2 cache after the
first time. They hold for the XLA version too, whose loops XLA counts as running once.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm_jax.config import ModelConfig

_INT32 = 4
KERNELS = ("cache_write", "paged_decode", "ragged_prefill")


@dataclass(frozen=True)
class Work:
    """Operations (a multiply-add is two) and bytes from and to device memory."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Load:
    """The new tokens of a step: `num_sequences` of `q_len` tokens each, whose newest sees `context` tokens."""

    num_sequences: int
    q_len: float
    context: float

    @property
    def num_tokens(self) -> float:
        """T."""
        return self.num_sequences * self.q_len


def decode_load(num_rows: int, context: int) -> Load:
    """Every row of the bucket is at `context` tokens."""
    return Load(num_rows, 1, context)


def prefill_load(num_tokens: int, context: int) -> Load:
    """The bucket is full of whole prompts of `context` tokens; of one chunk, if a prompt is longer than the bucket."""
    if context >= num_tokens:
        return Load(1, num_tokens, context)
    num_sequences = num_tokens // context
    return Load(num_sequences, num_tokens / num_sequences, num_tokens / num_sequences)


def load_of(kind: str, size: int, context: int) -> Load | None:
    """What a full bucket of a program computes; None for programs that run no kernel on tokens."""
    if kind == "decode":
        return decode_load(size, context)
    return prefill_load(size, context) if kind == "prefill" else None


def visible_pairs(load: Load, sliding_window: int | None) -> float:
    """Pairs of a query and a key that it sees, over all sequences."""
    q_len, context = load.q_len, load.context
    pairs = q_len * context - q_len * (q_len - 1) / 2
    if sliding_window is not None and context > sliding_window:
        # Queries whose context is longer than the window see the window, the others what there is.
        short = max(0.0, sliding_window - (context - q_len))
        pairs = (q_len - short) * sliding_window + short * sliding_window - short * (short - 1) / 2
    return load.num_sequences * pairs


def keys_read(load: Load, sliding_window: int | None) -> float:
    """Keys that at least one query sees, over all sequences."""
    seen = load.context
    if sliding_window is not None:
        seen = min(seen, sliding_window + load.q_len - 1)
    return load.num_sequences * seen


def kernel_work(
    kernel: str, model: ModelConfig, load: Load, *, itemsize: int, cache_itemsize: int, block_size: int, shards: int = 1
) -> Work:
    """Work of one layer's call on one device.

    Args:
        kernel: one of `KERNELS`.
        model: its H, K and D; heads are split over `shards`.
        load: what the step computes.
        itemsize: bytes an element of q, k and v.
        cache_itemsize: bytes an element of the cache.
        block_size: tokens a block.
        shards: devices that share the heads.

    Raises:
        KeyError: for another kernel.
    """
    H, K, D, T = model.num_heads / shards, model.num_kv_heads / shards, model.head_dim, load.num_tokens
    if kernel == "cache_write":
        return Work(0, 2 * T * K * D * (itemsize + cache_itemsize) + T * _INT32)
    if kernel not in KERNELS:
        raise KeyError(kernel)
    keys = keys_read(load, model.sliding_window)
    tables = keys / block_size * _INT32 + 2 * load.num_sequences * _INT32
    queries_and_output = 2 * T * H * D * itemsize
    flops = 4 * H * D * visible_pairs(load, model.sliding_window)
    return Work(flops, queries_and_output + 2 * keys * K * D * cache_itemsize + tables)
