"""Triton implementation: one kernel whose programs, one a multiprocessor, go through the layer's phases together."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import Target, current_target, triton_call, update_in_place
from nanovllm_kernels._device import ceil_div, next_power_of_2
from nanovllm_kernels.decode_layer.attention import attend, norm_weights, open_item
from nanovllm_kernels.decode_layer.barrier import arrive, read_ahead, wait_for
from nanovllm_kernels.decode_layer.one_row import one_row_kernel
from nanovllm_kernels.decode_layer.products import load_weights, product
from nanovllm_kernels.paged_decode.triton import plan_pieces

QKV, ATTEND, O, GATE_UP, DOWN = (tl.constexpr(phase) for phase in range(5))
_SYNC = 8  # counters of the kernel's own: whether a wait failed, and one a barrier
_MOST_MERGED = 16  # pieces of the row that each reader of a single row's attention merges


@dataclass(frozen=True)
class Tiling:
    """How one product is cut: `cols` outputs a task (of each half, if gated), `splits` of its inputs."""

    inputs: int
    outputs: int
    cols: int
    tile_cols: int
    tile_inputs: int
    splits: int
    split_inputs: int

    @property
    def tasks(self) -> int:
        """Tiles of outputs times splits."""
        return ceil_div(self.outputs, self.cols) * self.splits

    def words(self) -> int:
        return self.splits * self.outputs

    def constants(self, name: str) -> dict[str, int]:
        """The kernel's constexpr arguments."""
        return {
            f"{name}_INPUTS": self.inputs,
            f"{name}_OUTPUTS": self.outputs,
            f"{name}_COLS": self.cols,
            f"{name}_TILE_COLS": self.tile_cols,
            f"{name}_TILE_INPUTS": self.tile_inputs,
            f"{name}_SPLITS": self.splits,
            f"{name}_SPLIT_INPUTS": self.split_inputs,
            f"{name}_TASKS": self.tasks,
        }


@dataclass(frozen=True)
class Launch:
    """Launch parameters. `slices` of K are multiplied apart on tensor cores; 1 is the path for one row."""

    programs: int
    tile_rows: int
    slices: int
    num_warps: int
    tile_tokens: int
    stages: int
    tile_inputs: int
    most_cols: int
    read_ahead: int
    open_early: bool = False


def launch_parameters(target: Target, rows: int) -> Launch:
    tile_rows = 1 if rows == 1 else max(16, next_power_of_2(rows))
    return Launch(
        programs=target.multiprocessors,
        tile_rows=tile_rows,
        slices=1 if rows == 1 else 8,
        num_warps=8,
        tile_tokens=64,
        stages=3,
        tile_inputs=1024 if rows <= 16 else 256,
        most_cols=32,
        read_ahead=0 if target.compute_capability < 90 else 1,
    )


def whole_tiling(launch: Launch, inputs: int, outputs: int, gated: bool) -> Tiling:
    """Tasks that have all inputs: as many outputs each as fill the programs in the fewest rounds."""
    rounds = ceil_div(outputs, launch.programs * launch.most_cols)
    cols = min(launch.most_cols, ceil_div(ceil_div(outputs, launch.programs * rounds), 8) * 8)
    tile_inputs = min(launch.tile_inputs, next_power_of_2(inputs))
    return Tiling(inputs, outputs, cols, next_power_of_2(cols) * (1 + gated), tile_inputs, 1, inputs)


def split_tiling(launch: Launch, inputs: int, outputs: int) -> Tiling:
    """Tasks of few outputs, and as many splits of the inputs as there are programs for them."""
    whole = whole_tiling(replace(launch, programs=1), inputs, outputs, gated=False)
    splits = max(1, min(launch.programs // whole.tasks, inputs // 256))
    split_inputs = ceil_div(inputs, splits * 16) * 16
    tile_inputs = min(launch.tile_inputs, next_power_of_2(split_inputs))
    return replace(whole, tile_inputs=tile_inputs, splits=splits, split_inputs=split_inputs)


@triton.jit
@no_type_check
def decode_layer_kernel(
    x_ptr,
    input_norm_ptr,
    qkv_w_ptr,
    qkv_bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    tables_ptr,
    pieces_ptr,
    rows_ptr,
    total_pieces_ptr,
    o_w_ptr,
    post_norm_ptr,
    gate_up_w_ptr,
    down_w_ptr,
    next_w_ptr,
    sync_ptr,  # int32, zero before and after
    k_cache_ptr,
    v_cache_ptr,
    num_rows,
    num_kv_heads,
    table_width,
    out_ptr,  # [B, E]
    qkv_ptr,  # [B, K, G + 2, D]
    parts_ptr,
    lse_ptr,
    heads_ptr,  # [B, H, D]
    middle_ptr,  # [B, E]
    gated_ptr,  # [B, F]
    o_sums_ptr,
    down_sums_ptr,
    clock_ptr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PIECES: tl.constexpr,
    READ_AHEAD: tl.constexpr,
    SYNC: tl.constexpr,
    TIMED: tl.constexpr,
    OPEN_EARLY: tl.constexpr,
    QKV_INPUTS: tl.constexpr,
    QKV_OUTPUTS: tl.constexpr,
    QKV_COLS: tl.constexpr,
    QKV_TILE_COLS: tl.constexpr,
    QKV_TILE_INPUTS: tl.constexpr,
    QKV_SPLITS: tl.constexpr,
    QKV_SPLIT_INPUTS: tl.constexpr,
    QKV_TASKS: tl.constexpr,
    O_INPUTS: tl.constexpr,
    O_OUTPUTS: tl.constexpr,
    O_COLS: tl.constexpr,
    O_TILE_COLS: tl.constexpr,
    O_TILE_INPUTS: tl.constexpr,
    O_SPLITS: tl.constexpr,
    O_SPLIT_INPUTS: tl.constexpr,
    O_TASKS: tl.constexpr,
    GATE_UP_INPUTS: tl.constexpr,
    GATE_UP_OUTPUTS: tl.constexpr,
    GATE_UP_COLS: tl.constexpr,
    GATE_UP_TILE_COLS: tl.constexpr,
    GATE_UP_TILE_INPUTS: tl.constexpr,
    GATE_UP_SPLITS: tl.constexpr,
    GATE_UP_SPLIT_INPUTS: tl.constexpr,
    GATE_UP_TASKS: tl.constexpr,
    DOWN_INPUTS: tl.constexpr,
    DOWN_OUTPUTS: tl.constexpr,
    DOWN_COLS: tl.constexpr,
    DOWN_TILE_COLS: tl.constexpr,
    DOWN_TILE_INPUTS: tl.constexpr,
    DOWN_SPLITS: tl.constexpr,
    DOWN_SPLIT_INPUTS: tl.constexpr,
    DOWN_TASKS: tl.constexpr,
):
    ROW: tl.constexpr = SLICES == 1
    # A single row's split sums and pieces are added by those who read them, which spares them a meeting.
    MERGE: tl.constexpr = not ROW
    program = tl.program_id(0)
    failed_ptr = sync_ptr
    barriers_ptr = sync_ptr + 1
    counters_ptr = sync_ptr + SYNC
    num_pieces = tl.load(total_pieces_ptr)
    num_items = num_pieces * num_kv_heads
    NORM: tl.constexpr = q_norm_ptr is not None
    if TIMED:
        clock(clock_ptr, 0, PROGRAMS)

    if FIRST <= ATTEND and LAST >= ATTEND and OPEN_EARLY:
        opened = open_item(
            program, num_items, pieces_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, table_width,
            num_kv_heads, BLOCK_SIZE, HEAD_DIM, TILE_TOKENS,
        )  # fmt: skip
        q_norm = norm_weights(q_norm_ptr, HEAD_DIM, NORM)
        k_norm = norm_weights(k_norm_ptr, HEAD_DIM, NORM)

    if FIRST <= QKV:
        w = load_weights(
            qkv_w_ptr, program, 0, QKV_INPUTS, QKV_OUTPUTS, QKV_COLS, QKV_TILE_COLS, QKV_TILE_INPUTS, QKV_SPLITS,
            QKV_SPLIT_INPUTS, SLICES, False,
        )  # fmt: skip
        if READ_AHEAD >= 1:
            read_ahead(o_w_ptr, O_INPUTS * O_OUTPUTS * 2, PROGRAMS)
        if READ_AHEAD >= 2:
            read_ahead(gate_up_w_ptr, GATE_UP_INPUTS * GATE_UP_OUTPUTS * 4, PROGRAMS)
        if READ_AHEAD >= 3:
            read_ahead(down_w_ptr, DOWN_INPUTS * DOWN_OUTPUTS * 2, PROGRAMS)
        if LAST > FIRST:
            if program == 0:
                tl.store(barriers_ptr + 3, 0)  # left by the launch before
        product(
            w, x_ptr, qkv_w_ptr, num_rows, input_norm_ptr, qkv_bias_ptr, None, qkv_ptr, None, None,
            QKV_INPUTS, QKV_OUTPUTS, EPS, False, QKV_COLS, QKV_TILE_COLS, QKV_TILE_INPUTS, QKV_SPLITS,
            QKV_SPLIT_INPUTS, QKV_TASKS, TILE_ROWS, SLICES, PROGRAMS, False,
        )  # fmt: skip
        if TIMED:
            clock(clock_ptr, 1, PROGRAMS)
        if LAST > QKV:
            arrive(barriers_ptr)
            if READ_AHEAD == 1:
                read_ahead(gate_up_w_ptr, GATE_UP_INPUTS * GATE_UP_OUTPUTS * 4, PROGRAMS)

    if FIRST <= ATTEND and LAST >= ATTEND:
        if not OPEN_EARLY:
            opened = open_item(
                program, num_items, pieces_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, table_width,
                num_kv_heads, BLOCK_SIZE, HEAD_DIM, TILE_TOKENS,
            )  # fmt: skip
            q_norm = norm_weights(q_norm_ptr, HEAD_DIM, NORM)
            k_norm = norm_weights(k_norm_ptr, HEAD_DIM, NORM)
        if FIRST < ATTEND:
            wait_for(barriers_ptr, failed_ptr, PROGRAMS)
        if TIMED:
            clock(clock_ptr, 2, PROGRAMS)
        attend(
            opened, q_norm, k_norm, qkv_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, pieces_ptr,
            rows_ptr, num_items, heads_ptr, parts_ptr, lse_ptr, counters_ptr, num_kv_heads, table_width, EPS, SCALE,
            WINDOW, GROUP, BLOCK_SIZE, HEAD_DIM, TILE_HEADS, TILE_TOKENS, STAGES, PROGRAMS, PIECES, NORM, MERGE,
        )  # fmt: skip
        if TIMED:
            clock(clock_ptr, 3, PROGRAMS)
        if LAST > ATTEND:
            arrive(barriers_ptr + 1)
            if READ_AHEAD == 1:
                read_ahead(down_w_ptr, DOWN_INPUTS * DOWN_OUTPUTS * 2, PROGRAMS)

    if FIRST <= O and LAST >= O:
        w = load_weights(
            o_w_ptr, program, 0, O_INPUTS, O_OUTPUTS, O_COLS, O_TILE_COLS, O_TILE_INPUTS, O_SPLITS,
            O_SPLIT_INPUTS, SLICES, False,
        )  # fmt: skip
        if FIRST < O:
            wait_for(barriers_ptr + 1, failed_ptr, PROGRAMS)
            if program == 0:
                tl.store(barriers_ptr, 0)
        if TIMED:
            clock(clock_ptr, 4, PROGRAMS)
        product(
            w, heads_ptr, o_w_ptr, num_rows, None, None, x_ptr, middle_ptr, o_sums_ptr, counters_ptr,
            O_INPUTS, O_OUTPUTS, EPS, False, O_COLS, O_TILE_COLS, O_TILE_INPUTS, O_SPLITS,
            O_SPLIT_INPUTS, O_TASKS, TILE_ROWS, SLICES, PROGRAMS, MERGE,
            PIECES=PIECES if ROW else 0, HEAD_DIM=HEAD_DIM, parts_ptr=parts_ptr, lse_ptr=lse_ptr,
            num_pieces=num_pieces,
        )  # fmt: skip
        if TIMED:
            clock(clock_ptr, 5, PROGRAMS)
        if LAST > O:
            arrive(barriers_ptr + 2)
            if READ_AHEAD >= 1 and next_w_ptr is not None:
                read_ahead(next_w_ptr, QKV_INPUTS * QKV_OUTPUTS * 2, PROGRAMS)

    if FIRST <= GATE_UP and LAST >= GATE_UP:
        w = load_weights(
            gate_up_w_ptr, program, 0, GATE_UP_INPUTS, GATE_UP_OUTPUTS, GATE_UP_COLS, GATE_UP_TILE_COLS,
            GATE_UP_TILE_INPUTS, GATE_UP_SPLITS, GATE_UP_SPLIT_INPUTS, SLICES, True,
        )  # fmt: skip
        if FIRST < GATE_UP:
            wait_for(barriers_ptr + 2, failed_ptr, PROGRAMS)
            if program == 0:
                tl.store(barriers_ptr + 1, 0)
        if TIMED:
            clock(clock_ptr, 6, PROGRAMS)
        product(
            w, middle_ptr, gate_up_w_ptr, num_rows, post_norm_ptr, None, None, gated_ptr, None, None,
            GATE_UP_INPUTS, GATE_UP_OUTPUTS, EPS, True, GATE_UP_COLS, GATE_UP_TILE_COLS, GATE_UP_TILE_INPUTS,
            GATE_UP_SPLITS, GATE_UP_SPLIT_INPUTS, GATE_UP_TASKS, TILE_ROWS, SLICES, PROGRAMS, False,
            SUMS=O_SPLITS if ROW and O_SPLITS > 1 else 0, earlier_ptr=x_ptr, earlier_sums_ptr=o_sums_ptr,
            stored_ptr=middle_ptr,
        )  # fmt: skip
        if TIMED:
            clock(clock_ptr, 7, PROGRAMS)
        if LAST > GATE_UP:
            arrive(barriers_ptr + 3)

    if FIRST <= DOWN and LAST >= DOWN:
        w = load_weights(
            down_w_ptr, program, 0, DOWN_INPUTS, DOWN_OUTPUTS, DOWN_COLS, DOWN_TILE_COLS, DOWN_TILE_INPUTS,
            DOWN_SPLITS, DOWN_SPLIT_INPUTS, SLICES, False,
        )  # fmt: skip
        if FIRST < DOWN:
            wait_for(barriers_ptr + 3, failed_ptr, PROGRAMS)
            if program == 0:
                tl.store(barriers_ptr + 2, 0)
        if TIMED:
            clock(clock_ptr, 8, PROGRAMS)
        product(
            w, gated_ptr, down_w_ptr, num_rows, None, None, middle_ptr, out_ptr, down_sums_ptr, counters_ptr,
            DOWN_INPUTS, DOWN_OUTPUTS, EPS, False, DOWN_COLS, DOWN_TILE_COLS, DOWN_TILE_INPUTS, DOWN_SPLITS,
            DOWN_SPLIT_INPUTS, DOWN_TASKS, TILE_ROWS, SLICES, PROGRAMS, True,
        )  # fmt: skip
        if TIMED:
            clock(clock_ptr, 9, PROGRAMS)


@triton.jit
@no_type_check
def clock(clock_ptr, slot: tl.constexpr, PROGRAMS: tl.constexpr):
    now = tl.inline_asm_elementwise("mov.u32 $0, %globaltimer_lo;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(clock_ptr + slot * PROGRAMS + tl.program_id(0), now)


def decode_layer_triton(
    x: Float[Array, "B E"],
    weights: dict[str, Any],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "B P"],
    context_lens: Int[Array, " B"],
    *,
    eps: float,
    scale: float,
    sliding_window: int | None,
    counters: jax.Ref,
    call: Array | None = None,
    next_qkv: Array | None = None,
    launch: Launch | None = None,
    timed: bool = False,
) -> tuple[Any, ...]:
    num_rows, width = x.shape
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    qkv_w, gate_up_w = weights["qkv"], weights["gate_up"]
    group = qkv_w.shape[2] - 2
    num_heads, mlp = num_kv_heads * group, gate_up_w.shape[2]
    launch = launch or launch_parameters(current_target(), num_rows)
    qkv_out = num_kv_heads * (group + 2) * head_dim
    tilings = {
        "QKV": whole_tiling(launch, width, qkv_out, False),
        "O": split_tiling(launch, num_heads * head_dim, width),
        "GATE_UP": whole_tiling(replace(launch, most_cols=24 if launch.most_cols == 32 else 16), width, mlp, True),
        "DOWN": split_tiling(launch, mlp, width),
    }
    window = sliding_window or 0
    useful = num_rows * ceil_div(block_tables.shape[1] * block_size, launch.tile_tokens)
    wanted = max(1, launch.programs // num_kv_heads)
    most_pieces = min(_MOST_MERGED if num_rows == 1 else wanted, wanted, useful)
    plan, rows = plan_pieces(context_lens, window=window, tile_tokens=launch.tile_tokens, most_pieces=most_pieces)
    total = jnp.sum(rows[:, 1], dtype=jnp.int32)
    pieces = num_rows + most_pieces
    shape = jax.ShapeDtypeStruct
    out_type = (
        shape((num_rows, width), x.dtype),
        shape((num_rows, num_kv_heads, group + 2, head_dim), x.dtype),
        shape((pieces, num_heads, head_dim), jnp.float32),
        shape((pieces, num_heads), jnp.float32),
        shape((num_rows, num_heads, head_dim), x.dtype),
        shape((num_rows, width), x.dtype),
        shape((num_rows, mlp), x.dtype),
        shape((tilings["O"].splits, num_rows, width), jnp.float32),
        shape((tilings["DOWN"].splits, num_rows, width), jnp.float32),
        shape((10, launch.programs if timed else 1), jnp.int32),
    )
    constants = {}
    for name, tiling in tilings.items():
        constants |= tiling.constants(name)
    results = []
    shared = {
        "PROGRAMS": launch.programs,
        "EPS": eps,
        "SCALE": scale,
        "WINDOW": window,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "HEAD_DIM": head_dim,
        "TILE_TOKENS": launch.tile_tokens,
        "STAGES": launch.stages,
        "PIECES": _MOST_MERGED,
        "READ_AHEAD": launch.read_ahead,
        "OPEN_EARLY": launch.open_early,
        "SYNC": _SYNC,
        "num_warps": launch.num_warps,
        "num_stages": 1,
        "grid": (launch.programs,),
    }
    if call is not None:

        def run_row(k_cache: jax.Ref, v_cache: jax.Ref) -> None:
            results.append(
                triton_call(
                    x,
                    weights["input_norm"],
                    qkv_w,
                    weights.get("qkv_bias"),
                    weights.get("q_norm"),
                    weights.get("k_norm"),
                    cos,
                    sin,
                    block_tables,
                    plan,
                    total,
                    weights["o"],
                    weights["post_norm"],
                    gate_up_w,
                    weights["down"],
                    next_qkv,
                    call,
                    counters,
                    k_cache,
                    v_cache,
                    num_kv_heads,
                    block_tables.shape[1],
                    kernel=one_row_kernel,
                    out_type=shape((num_rows, width), x.dtype),
                    FIRST=0,
                    LAST=5,
                    TILE_HEADS=next_power_of_2(group + 2),
                    **shared,
                    **constants,
                )
            )

        caches = update_in_place(run_row, k_cache, v_cache)
        return results[0], *caches

    def run(k_cache: jax.Ref, v_cache: jax.Ref) -> None:
        results.append(
            triton_call(
                x,
                weights["input_norm"],
                qkv_w,
                weights.get("qkv_bias"),
                weights.get("q_norm"),
                weights.get("k_norm"),
                cos,
                sin,
                block_tables,
                plan,
                rows,
                total,
                weights["o"],
                weights["post_norm"],
                gate_up_w,
                weights["down"],
                next_qkv,
                counters,
                k_cache,
                v_cache,
                num_rows,
                num_kv_heads,
                block_tables.shape[1],
                kernel=decode_layer_kernel,
                out_type=out_type,
                grid=(launch.programs,),
                num_warps=launch.num_warps,
                num_stages=1,
                FIRST=0,
                LAST=4,
                PROGRAMS=launch.programs,
                TILE_ROWS=launch.tile_rows,
                SLICES=launch.slices,
                EPS=eps,
                SCALE=scale,
                WINDOW=window,
                GROUP=group,
                BLOCK_SIZE=block_size,
                HEAD_DIM=head_dim,
                TILE_HEADS=max(16, next_power_of_2(group)),
                TILE_TOKENS=launch.tile_tokens,
                STAGES=launch.stages,
                PIECES=_MOST_MERGED,
                READ_AHEAD=launch.read_ahead,
                SYNC=_SYNC,
                TIMED=timed,
                OPEN_EARLY=launch.open_early,
                **constants,
            )
        )

    caches = update_in_place(run, k_cache, v_cache)
    out, *_, clocks = results[0]
    return (out, *caches, clocks) if timed else (out, *caches)
