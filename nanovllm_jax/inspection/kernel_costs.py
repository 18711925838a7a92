"""What each kernel must compute and move, in closed form, since XLA sees nothing inside a custom call.

The formulas count each operand once: a key or value that several tiles read comes from the GPU's L2 cache after the
first time. A kernel is known by the `jax.named_scope` around its call, which has the operation's name, or by its device
function's name. To add one, write its formula and enter it at the end of this file:

- in `BY_LOAD`, if its work depends on what the step holds (lengths of sequences, blocks of the cache) and not on its
  operands' shapes alone, as `_rope_cache_write`. The formula then counts for the XLA version too, whose loops XLA
  counts as running once.
- in `BY_OPERANDS`, if the shapes of its calls say all: products, norms, anything that reads and writes each operand
  once, as `_skinny_matmul`. Its XLA version needs no formula, being counted as the products that it consists of.
  Calls in one scope make one row if their first two operands have the same shapes; give each its own scope to have
  it measured apart.

A call of a Triton or Mosaic kernel that has no formula is reported as a finding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nanovllm_jax.config import ModelConfig

_INT32 = _FLOAT32 = 4


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
    if kind.startswith("decode"):
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


@dataclass(frozen=True)
class Site:
    """Where a kernel is called: one layer on one device (all layers, of a kernel that does them all).

    Attributes:
        model: its shape; heads are split over `shards`.
        load: what the step computes.
        itemsize: bytes an element of q, k and v.
        cache_itemsize: bytes an element of the cache.
        block_size: tokens a block.
        shards: devices that share the heads.
    """

    model: ModelConfig
    load: Load
    itemsize: int
    cache_itemsize: int
    block_size: int
    shards: int = 1

    @property
    def T(self) -> float:
        """New tokens."""
        return self.load.num_tokens

    @property
    def H(self) -> float:
        """Query heads of this device."""
        return self.model.num_heads / self.shards

    @property
    def K(self) -> float:
        """KV heads of this device."""
        return self.model.num_kv_heads / self.shards

    @property
    def D(self) -> int:
        """Head dimension."""
        return self.model.head_dim


class Shaped(Protocol):
    """An operand or result: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: Any

    def str_short(self, short_dtypes: bool = False) -> str:
        """As in "bf16[8,1024]"."""
        ...


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        kernel: name of the device function; none for Mosaic.
        operands: in the order of the call; Mosaic's in the order of their use, results among them.
        results: in the order of the call.
    """

    kernel: str
    operands: Sequence[Shaped]
    results: Sequence[Shaped]

    @property
    def leading(self) -> Sequence[Shaped]:
        """The first two operands: activations [M, K] and a weight, where it is a product."""
        if self.kernel:
            return self.operands[:2]
        # A product of many rows with gate and up has larger arrays than its weight.
        gated = [one for one in self.operands if len(one.shape) == 3]
        weight = gated[0] if gated else max(self.operands, key=array_bytes)
        matrices = [one for one in self.operands if len(one.shape) == 2 and one is not weight]
        return next(one for one in matrices if one.shape[1] == weight.shape[0]), weight

    @property
    def bytes(self) -> float:
        """Of all operands and results, each once."""
        return sum(map(array_bytes, (*self.operands, *self.results)))


def array_bytes(array: Shaped) -> float:
    """Bytes of one array."""
    return math.prod(array.shape) * array.dtype.itemsize


def _rope_cache_write(site: Site) -> Work:
    """Projections read, queries written, keys and values cached; cosine and sine are float32."""
    heads = site.H + site.K
    moved = 2 * heads * site.itemsize + 2 * site.K * site.cache_itemsize + _FLOAT32
    return Work(3 * site.T * heads * site.D, site.T * site.D * moved + site.T * _INT32)


def _paged_attention(site: Site) -> Work:
    """Two products a visible pair of query and key; q, output, the keys and values that are seen, and the tables."""
    load, window = site.load, site.model.sliding_window
    keys = keys_read(load, window)
    tables = keys / site.block_size * _INT32 + 2 * load.num_sequences * _INT32
    queries_and_output = 2 * site.T * site.H * site.D * site.itemsize
    flops = 4 * site.H * site.D * visible_pairs(load, window)
    return Work(flops, queries_and_output + 2 * keys * site.K * site.D * site.cache_itemsize + tables)


def _rope_paged_decode(site: Site) -> Work:
    """Both, but for queries that stay in registers, and the newest keys and values, which are written alone."""
    written, attended = _rope_cache_write(site), _paged_attention(site)
    kept = site.T * site.D * (2 * site.H * site.itemsize + 2 * site.K * site.cache_itemsize)
    return Work(written.flops + attended.flops, written.bytes + attended.bytes - kept)


def _decode_layers(site: Site) -> Work:
    """All layers' weights once, their attention and cache writes; hidden states in and out. The rest stays in L2."""
    model, attention, write = site.model, _paged_attention(site), _rope_cache_write(site)
    width, mlp = model.hidden_size, model.intermediate_size
    weights = width * site.D * 2 * (site.H + site.K) + 3 * width * mlp
    heads = site.T * site.D * site.itemsize
    # Queries, keys and values of the new tokens and what attention makes of them are passed on inside.
    inside = heads * 2 * site.H + heads * 2 * (site.H + site.K)
    moved = weights * site.itemsize + attention.bytes + write.bytes - inside
    flops = 2 * site.T * weights + attention.flops + write.flops
    return Work(model.num_layers * flops, model.num_layers * moved + 2 * site.T * width * site.itemsize)


def _skinny_matmul(call: Call) -> Work:
    """Activations [M, K] and a weight read, [M, N] written; gate and up columns give one column each."""
    x, weight = call.leading
    rows, width = x.shape
    outputs = math.prod(weight.shape) // width // (2 if len(weight.shape) == 3 else 1)
    moved = array_bytes(x) + array_bytes(weight) + rows * outputs * x.dtype.itemsize
    return Work(2 * rows * math.prod(weight.shape), moved)


def _add_shards(call: Call) -> Work:
    """An addition for each shard, one for the residual, and what is passed on; what crosses links stays in L2."""
    part, *others, table = call.operands
    elements, shards = math.prod(part.shape), (math.prod(table.shape) - 1) // 2
    residuals = sum(other.shape == part.shape for other in others)
    passed_on = sum(result.shape == part.shape for result in call.results) - 1
    # A product with the norm's weight, a square and its addition, of each element that is passed on.
    return Work((shards - 1 + residuals + 3 * passed_on) * elements, call.bytes)


def _rms_norm(call: Call) -> Work:
    """The square and its sum, and two products, an element; with an addition before them one more."""
    each = 5 if call.kernel.startswith("add") else 4
    return Work(each * math.prod(call.operands[0].shape), call.bytes)


def _silu_mul(call: Call) -> Work:
    """An exponential, an addition, a quotient and two products, an element of the result."""
    return Work(5 * math.prod(call.results[0].shape), call.bytes)


def _sample(call: Call) -> Work:
    """The pass over the logits; what follows it reads a few groups or partial results a row."""
    if call.kernel not in ("plain_kernel", "scan_kernel"):
        return Work(0, 0)
    logits = call.operands[0]
    operations = 40 if call.kernel == "plain_kernel" else 10  # an element: the noise, or the groups' maxima
    return Work(operations * math.prod(logits.shape), array_bytes(logits))


def _sample_head(call: Call) -> Work:
    """The product, and 40 operations of noise a logit; what follows it reads the best of each tile."""
    if call.kernel != "head_race_kernel":
        return Work(0, 0)
    hidden, head = call.operands[:2]
    return Work((2 * hidden.shape[1] + 40) * hidden.shape[0] * head.shape[0], array_bytes(hidden) + array_bytes(head))


BY_LOAD: dict[str, Callable[[Site], Work]] = {
    "rope_cache_write": _rope_cache_write,
    "paged_decode": _paged_attention,
    "rope_paged_decode": _rope_paged_decode,
    "decode_layers": _decode_layers,
    "ragged_prefill": _paged_attention,
}
BY_OPERANDS: dict[str, Callable[[Call], Work]] = {
    "product_kernel": _skinny_matmul,
    "add_shards_kernel": _add_shards,
    "add_rms_norm_kernel": _rms_norm,
    "rms_norm_kernel": _rms_norm,
    "silu_mul_kernel": _silu_mul,
    "product_mosaic": _skinny_matmul,
    "sample": _sample,
    "sample_head": _sample_head,
}
