"""Pallas Mosaic GPU implementation for sm_90: a persistent FlashAttention-3 over paged K and V.

Three warpgroups a program. The producer copies a tile of queries and then K and V, page by page with TMA, into a
ring of stages in shared memory. Two consumers, 64 rows each, share every tile of K and V: they are two query heads
of one KV head, or, where the group is odd, two neighbouring tiles of one head. While one does its softmax the other
has the tensor cores (Shah et al., FlashAttention-3, arXiv:2407.08608, section 3.1). One program a multiprocessor
walks through the work list, so that the producer fetches the next tile while the consumers finish this one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import current_target
from nanovllm_kernels.ragged_prefill.worklist import ROW_ALIGNMENT, WorkList, work_list

_CONSUMERS = 2
_ROWS = 64  # of a consumer: the M of wgmma
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Launch:
    """Launch parameters: tokens of a tile of K and V, tiles of each in flight, registers a thread may use.

    Registers of both consumers and the producer together are at most 512, what a multiprocessor has for each
    thread of a warpgroup.
    """

    tile_tokens: int = 128
    stages: int = 2
    consumer_registers: int = 216
    producer_registers: int = 80


def launch_parameters(*, head_dim: int) -> Launch:
    """Reasoned, not yet measured.

    At D=128, two stages of 128 tokens are what shared memory holds beside queries and outputs. With 232 and 40
    registers ptxas spills in the producer, which holds the block numbers of a tile; with these it does not.
    """
    return Launch(stages=2 if head_dim > 64 else 4)


@dataclass(frozen=True)
class _Shape:
    """What the kernel is compiled for."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    num_blocks: int
    table_width: int
    scale: float
    dtype: Any
    launch: Launch
    programs: int
    interpreted: bool

    @property
    def heads_a_program(self) -> int:
        """2: the consumers take two heads and the same queries. 1: one head and neighbouring queries."""
        return 2 if self.group % 2 == 0 else 1

    @property
    def units(self) -> int:
        """Programs' worth of heads a tile of queries."""
        return self.num_kv_heads * self.group // self.heads_a_program

    @property
    def tile_queries(self) -> int:
        return _ROWS * _CONSUMERS // self.heads_a_program

    @property
    def tile_blocks(self) -> int:
        return self.launch.tile_tokens // self.block_size


@dataclass(frozen=True)
class _Shared:
    """Shared memory and barriers of a program."""

    q: Any  # [consumers, 64, D]
    k: Any  # [stages, tile_tokens, D]
    v: Any
    out: Any  # [consumers, 64, D], swizzled: whole tiles
    out_rows: Any  # the same, row by row: tiles at the ends of a sequence
    q_ready: Any
    q_free: Any
    k_ready: Any  # [stages] each
    k_free: Any
    v_ready: Any
    v_free: Any
    tail_ready: Any
    turn: Any  # whose turn on the tensor cores it is


def _scratch(shape: _Shape) -> dict[str, Any]:
    """The type of each field of `_Shared`."""
    stages, tile_tokens, head_dim = shape.launch.stages, shape.launch.tile_tokens, shape.head_dim
    # wgmma reads tiles of 8 rows by 128 bytes with 128-byte swizzle.
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    rows = (_CONSUMERS, _ROWS, head_dim)
    ring = plgpu.SMEM((stages, tile_tokens, head_dim), shape.dtype, transforms=transforms)
    return {
        "q": plgpu.SMEM(rows, shape.dtype, transforms=transforms),
        "k": ring,
        "v": ring,
        "outs": plgpu.RefUnion(plgpu.SMEM(rows, shape.dtype, transforms=transforms), plgpu.SMEM(rows, shape.dtype)),
        "q_ready": plgpu.Barrier(num_arrivals=_CONSUMERS),
        "q_free": plgpu.Barrier(num_arrivals=_CONSUMERS),
        "k_ready": plgpu.Barrier(num_arrivals=shape.tile_blocks, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
        "v_ready": plgpu.Barrier(num_arrivals=shape.tile_blocks, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
        "tail_ready": plgpu.Barrier(num_arrivals=shape.tile_blocks),
        "turn": plgpu.Barrier(num_arrivals=_CONSUMERS),
    }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Tile:
    """Scalars of one tile of queries and one unit of heads; see `WorkList`."""

    row: Any
    first: Any
    last: Any
    position: Any
    keys: Any
    seq: Any
    context: Any
    unit: Any


def _for_each_tile(work: Any, shape: _Shape, visit: Callable[[_Tile, Any], Any]) -> Any:
    """Calls `visit(tile, step) -> step` for this program's tiles; `step` counts tiles of K and V, returned at the end.

    Programs take tiles in turn, forwards then backwards, so that costliest first also means evenly. The scalars
    of the next tile are loaded before a tile is worked on, which hides their latency.
    """
    programs = shape.programs
    program = lax.axis_index("program")
    total = work.count[0] * shape.units

    def index_of(ordinal: Any) -> Any:
        forwards = lax.rem(ordinal, 2) == 0
        return ordinal * programs + lax.select(forwards, program, programs - 1 - program)

    def load(ordinal: Any) -> _Tile:
        index = jnp.minimum(index_of(ordinal), total - 1)
        entry = lax.div(index, shape.units)
        names = ("row", "first", "last", "position", "keys", "seq", "context")
        return _Tile(**{name: getattr(work, name)[entry] for name in names}, unit=lax.rem(index, shape.units))

    def step(ordinal: Any, carry: Any) -> Any:
        tile, steps = carry
        following = load(ordinal + 1)
        return following, visit(tile, steps)

    rounds = lax.div(total, programs)
    tiles = rounds + (index_of(rounds) < total).astype(jnp.int32)
    _, steps = lax.fori_loop(0, tiles, step, (load(jnp.int32(0)), jnp.int32(0)))
    return steps


def _head_and_row(tile: _Tile, consumer: Any, shape: _Shape) -> tuple[Any, Any]:
    """Query head of a consumer, and its first row in the tile."""
    if shape.heads_a_program == _CONSUMERS:
        return tile.unit * _CONSUMERS + consumer, jnp.int32(0)
    return tile.unit, consumer * _ROWS


def _produce(work: Any, tables: Any, q: Any, k_cache: Any, v_cache: Any, shared: _Shared, shape: _Shape) -> None:
    """Fetches queries, keys and values of all tiles of this program."""
    stages, tile_tokens, block_size = shape.launch.stages, shape.launch.tile_tokens, shape.block_size
    nowhere = shape.num_blocks * shape.num_kv_heads  # past the end: TMA writes zeros

    def acquire(free: Any, step: Any) -> None:
        """Waits until what the ring held `stages` steps ago has been consumed."""
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[lax.rem(step, stages)]))

    def fetch_queries(tile: _Tile) -> None:
        for consumer in range(_CONSUMERS):
            head, row = _head_and_row(tile, consumer, shape)
            source = q.at[pl.ds(pl.multiple_of(tile.row + row, ROW_ALIGNMENT), _ROWS), head]
            plgpu.copy_gmem_to_smem(source, shared.q.at[consumer], shared.q_ready)

    def fetch_pages(cache: Any, pages: list[Any], destination: Any, barrier: Any) -> None:
        for block, page in enumerate(pages):
            plgpu.copy_gmem_to_smem(
                cache.at[page], destination.at[pl.ds(block * block_size, block_size)], barrier
            )

    def fetch_tail(pages: list[Any], values: Any, valid: Any, barrier: Any) -> None:
        """The tile in which the context ends inside a page: slots past it are cleared.

        They may hold NaN, and a weight of zero does not get rid of NaN. Keys need no such care: their scores
        are masked.
        """
        fetch_pages(v_cache, pages, values, shared.tail_ready)
        plgpu.barrier_wait(shared.tail_ready)
        for start in range(0, tile_tokens, _ROWS):
            @pl.when(start + _ROWS > valid)
            def _() -> None:
                rows = values.at[pl.ds(start, _ROWS)]
                index = plgpu.broadcasted_iota(jnp.int32, (_ROWS, shape.head_dim), 0, layout=plgpu.Layout.WGMMA)
                loaded = plgpu.load(rows, layout=plgpu.Layout.WGMMA, optimized=False)
                rows[...] = jnp.where(index + start < valid, loaded, jnp.zeros_like(loaded))
        plgpu.commit_smem()
        for _ in pages:
            plgpu.barrier_arrive(barrier)

    def visit(tile: _Tile, first_step: Any) -> Any:
        steps = _kv_tiles(tile, shape)
        pl.when((steps > 0) & (first_step > 0))(lambda: plgpu.barrier_wait(shared.q_free))
        pl.when(steps > 0)(lambda: fetch_queries(tile))
        kv_head = lax.div(tile.unit * shape.heads_a_program, shape.group)

        def fetch(index: Any, _: Any) -> None:
            step = first_step + index
            stage = lax.rem(step, stages)
            pages = []
            for block in range(shape.tile_blocks):
                position = index * tile_tokens + block * block_size
                column = jnp.minimum(index * shape.tile_blocks + block, shape.table_width - 1)
                page = tables[tile.seq, column] * shape.num_kv_heads + kv_head
                pages.append(lax.select(position < tile.keys, page, nowhere))
            acquire(shared.k_free, step)
            fetch_pages(k_cache, pages, shared.k.at[stage], shared.k_ready.at[stage])
            acquire(shared.v_free, step)
            valid = tile.context - index * tile_tokens
            is_tail = (valid < tile_tokens) & (lax.rem(tile.context, block_size) != 0)
            values, barrier = shared.v.at[stage], shared.v_ready.at[stage]
            pl.when(is_tail)(lambda: fetch_tail(pages, values, valid, barrier))
            pl.when(jnp.logical_not(is_tail))(lambda: fetch_pages(v_cache, pages, values, barrier))

        lax.fori_loop(0, steps, fetch, None)
        return first_step + steps

    steps = _for_each_tile(work, shape, visit)
    # Nothing is left unobserved: a barrier must not be taken down under an arrival to come.
    pl.when(steps > 0)(lambda: plgpu.barrier_wait(shared.q_free))
    for ahead in range(stages):
        acquire(shared.k_free, steps + ahead)
        acquire(shared.v_free, steps + ahead)


def _kv_tiles(tile: _Tile, shape: _Shape) -> Any:
    return lax.div(tile.keys + (shape.launch.tile_tokens - 1), shape.launch.tile_tokens)


def _consume(work: Any, out: Any, shared: _Shared, shape: _Shape, consumer: Any) -> None:
    """Attention of one consumer's rows of all tiles of this program."""
    tile_tokens, head_dim = shape.launch.tile_tokens, shape.head_dim
    rows_layout = plgpu.Layout.WGMMA.reduce(1)

    def visit(tile: _Tile, first_step: Any) -> Any:
        steps = _kv_tiles(tile, shape)
        head, row = _head_and_row(tile, consumer, shape)
        position = tile.position + row
        # The second consumer is half a step behind the first, from the first product of a tile to the last. Tiles
        # without keys, the padding, pass no barrier at all.
        pl.when(steps > 0)(lambda: plgpu.barrier_wait(shared.q_ready))
        pl.when((steps > 0) & (consumer == 1))(lambda: _take_turns(shared))
        state = (
            plgpu.layout_cast(jnp.zeros((_ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((_ROWS,), -jnp.inf, jnp.float32), rows_layout),
            plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), rows_layout),
        )
        unmasked = jnp.minimum(lax.div(jnp.maximum(position + 1, 0), tile_tokens), steps)
        attend = lambda masked: lambda index, state: _attend(  # noqa: E731
            index, first_step, steps, state, position if masked else None, shared, shape, consumer
        )
        state = lax.fori_loop(0, unmasked, attend(False), state)
        acc, _, total = lax.fori_loop(unmasked, steps, attend(True), state)
        pl.when((steps > 0) & (consumer == 0))(lambda: plgpu.barrier_arrive(shared.turn))
        inverse = 1 / jnp.where(total > 0, total, jnp.ones_like(total))
        result = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(shape.dtype)
        _store(result, out, tile, row, head, shared, consumer)
        pl.when((steps > 0) & (consumer == 0))(lambda: plgpu.barrier_wait(shared.turn))
        return first_step + steps

    _for_each_tile(work, shape, visit)
    plgpu.wait_smem_to_gmem(0)


def _take_turns(shared: _Shared) -> None:
    plgpu.barrier_arrive(shared.turn)
    plgpu.barrier_wait(shared.turn)


def _attend(
    index: Any, first_step: Any, steps: Any, state: Any, position: Any, shared: _Shared, shape: _Shape, consumer: Any
) -> Any:
    """Folds a tile of K and V into the softmax; `position`, if any, is that of row 0 and says to mask.

    Both consumers pass `turn` twice a tile: after issuing the first product, and between softmax and second
    product. Their passes pair up crosswise, so one computes its softmax while the other multiplies.
    """
    acc, maximum, total = state
    tile_tokens = shape.launch.tile_tokens
    stage = lax.rem(first_step + index, shape.launch.stages)
    plgpu.barrier_wait(shared.k_ready.at[stage])

    def multiply_keys(scores: Any) -> Array:
        plgpu.wgmma(scores, shared.q.at[consumer], shared.k.at[stage].transpose((1, 0)))
        _take_turns(shared)
        return scores[...]

    scores = pl.run_scoped(multiply_keys, plgpu.ACC((_ROWS, tile_tokens), jnp.float32))
    plgpu.barrier_arrive(shared.k_free.at[stage])
    pl.when(index == steps - 1)(lambda: plgpu.barrier_arrive(shared.q_free))
    if position is not None:
        rows = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
        columns = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        # A select: what a masked key left may be NaN.
        scores = jnp.where(columns + index * tile_tokens <= rows + position, scores, -jnp.inf)

    # Scaled to powers of 2 in the same multiply-add that subtracts the maximum. A row that sees nothing gets NaN
    # here; only rows that belong to nobody are such, and they are not stored.
    factor = shape.scale * _LOG2_E
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1) * factor)
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
    acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
    total = total * decay + jnp.sum(weights, axis=1)
    operand = weights.astype(shape.dtype)
    # All of it before the turn goes to the other consumer, or the compiler moves it past the barrier.
    acc, new_maximum, total, operand = lax.optimization_barrier((acc, new_maximum, total, operand))
    plgpu.barrier_arrive(shared.turn)
    plgpu.barrier_wait(shared.v_ready.at[stage])
    plgpu.barrier_wait(shared.turn)
    if shape.interpreted:  # the interpreter knows wgmma on two references only
        acc = acc + jnp.dot(operand, shared.v[stage], preferred_element_type=jnp.float32)
    else:
        acc = pl.run_state(lambda acc: plgpu.wgmma(acc, operand, shared.v.at[stage]))(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(shared.v_free.at[stage])
    return acc, new_maximum, total


def _store(result: Any, out: Any, tile: _Tile, row: Any, head: Any, shared: _Shared, consumer: Any) -> None:
    """Writes the rows of a consumer that belong to the tile's sequence, [64, D]."""
    first = jnp.maximum(tile.first - row, 0)
    last = jnp.minimum(tile.last - row, _ROWS)
    start = tile.row + row
    whole = (first == 0) & (last == _ROWS)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before

    @pl.when(whole)
    def _() -> None:
        shared.out[consumer] = result
        plgpu.commit_smem()
        aligned = pl.multiple_of(start, ROW_ALIGNMENT)
        plgpu.copy_smem_to_gmem(shared.out.at[consumer], out.at[pl.ds(aligned, _ROWS), head])

    @pl.when(jnp.logical_not(whole))
    def _() -> None:
        shared.out_rows[consumer] = result
        plgpu.commit_smem()
        # TMA copies a fixed number of rows: one copy a power of 2 in their number.
        count, offset = jnp.maximum(last - first, 0), first
        for size in (32, 16, 8, 4, 2, 1):
            @pl.when((count & size) != 0)
            def _(size: int = size, offset: Any = offset) -> None:
                source = shared.out_rows.at[consumer, pl.ds(offset, size)]
                plgpu.copy_smem_to_gmem(source, out.at[pl.ds(start + offset, size), head])
            offset = offset + (count & size)


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _attention(
    work: WorkList,
    tables: Int[Array, "S P"],
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "pages block_size D"],
    v_pages: Float[Array, "pages block_size D"],
    *,
    shape: _Shape,
    interpret: Any,
) -> Float[Array, "T H D"]:
    """The kernel; a jitted function of its own, so that the layers of a model lower it once."""

    def kernel(work: Any, tables: Any, q: Any, k_pages: Any, v_pages: Any, out: Any, scratch: Any) -> None:
        out_tiles, out_rows = scratch.pop("outs")
        shared = _Shared(out=out_tiles, out_rows=out_rows, **scratch)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < _CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(shape.launch.consumer_registers, action="increase")
            _consume(work, out, shared, shape, warpgroup)

        @pl.when(warpgroup == _CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(shape.launch.producer_registers, action="decrease")
            _produce(work, tables, q, k_pages, v_pages, shared, shape)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[_scratch(shape)],
        grid=(shape.programs,),
        grid_names=("program",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        # Each warpgroup touches shared memory between explicit barriers and commits only; a barrier before every
        # copy would cost the producer 16 a tile.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(work, tables, q, k_pages, v_pages)


def ragged_prefill_mosaic(
    q: Float[Array, "T H D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, "S+1"],
    context_lens: Int[Array, " S"],
    *,
    scale: float,
    interpret: Any = None,
) -> Float[Array, "T H D"]:
    """As `ragged_prefill`, for what `mosaic_supports` allows; `interpret`: parameters of Mosaic's interpreter."""
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, block_size, _ = k_cache.shape
    shape = _Shape(
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=num_blocks,
        table_width=block_tables.shape[1],
        scale=scale,
        dtype=q.dtype,
        launch=launch_parameters(head_dim=head_dim),
        programs=current_target().multiprocessors,
        interpreted=interpret is not None,
    )
    # TMA moves whole groups of rows. The rows added are padding like any other.
    num_rows = max(num_tokens + -num_tokens % ROW_ALIGNMENT, _ROWS)
    padded_q = jnp.pad(q, ((0, num_rows - num_tokens), (0, 0), (0, 0)))
    work = work_list(context_lens, cu_q_lens, num_tokens=num_rows, tile_queries=shape.tile_queries)
    pages = (num_blocks * num_kv_heads, block_size, head_dim)
    out = _attention(
        work, block_tables, padded_q, k_cache.reshape(pages), v_cache.reshape(pages), shape=shape, interpret=interpret
    )
    return out[:num_tokens]
