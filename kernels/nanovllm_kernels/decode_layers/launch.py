"""How a layer is cut over programs: each has at most one task of each product, and holds its weights in registers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax

from nanovllm_kernels._compat import Target
from nanovllm_kernels._integers import ceil_div, next_power_of_2

_LEAST_SPLIT = 256  # inputs of a split: below, adding the splits costs more than the products
_SPLIT_COLS = 32
# Of a task's weights, gate and up counted both: 128 KB in bfloat16, half of a multiprocessor's registers.
_MOST_INPUTS, _MOST_COLS = 1024, 64
_MOST_PIECES = 16  # of the context: all of them are read at once by each program that merges them


@dataclass(frozen=True)
class Launch:
    """`programs` must all be resident at once. The context is cut into at most `most_pieces` of whole token tiles."""

    programs: int
    num_warps: int
    tile_tokens: int
    num_stages: int
    most_pieces: int


@dataclass(frozen=True)
class Tiling:
    """How one product is cut: `cols` outputs a task (gate and up columns alike, if gated), `splits` of its inputs."""

    inputs: int
    outputs: int
    cols: int
    tile_cols: int
    splits: int

    @property
    def split_inputs(self) -> int:
        """Inputs of a split; the last one may have fewer."""
        return ceil_div(self.inputs, self.splits * 16) * 16

    @property
    def tile_inputs(self) -> int:
        """`split_inputs` padded to a power of two."""
        return next_power_of_2(self.split_inputs)

    @property
    def tasks(self) -> int:
        """Tiles of outputs times splits."""
        return ceil_div(self.outputs, self.cols) * self.splits

    def fits(self, programs: int) -> bool:
        """Whether each task has a program, and registers for its weights, which are loaded in pairs."""
        held = self.tile_inputs <= _MOST_INPUTS and self.tile_cols <= _MOST_COLS
        return self.tasks <= programs and held and self.outputs % 2 == 0


@dataclass(frozen=True)
class Tilings:
    """Those of a layer's four products."""

    qkv: Tiling
    o: Tiling
    gate_up: Tiling
    down: Tiling

    def fit(self, programs: int) -> bool:
        """Whether all of them do."""
        return all(tiling.fits(programs) for tiling in (self.qkv, self.o, self.gate_up, self.down))

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's constexpr arguments."""
        named = {"QKV": self.qkv, "O": self.o, "GATE_UP": self.gate_up, "DOWN": self.down}
        fields = ("inputs", "outputs", "cols", "tile_cols", "tile_inputs", "splits", "split_inputs")
        return {f"{name}_{field.upper()}": getattr(tiling, field) for name, tiling in named.items() for field in fields}


def launch_parameters(target: Target, num_kv_heads: int) -> Launch:
    """One program of eight warps a multiprocessor, which may then use all of its registers.

    Measured on an H200 with Qwen3-0.6B's layer: 16 warps, two programs of four warps a multiprocessor, and reading
    weights ahead into the L2 cache were slower.
    """
    return Launch(
        programs=target.multiprocessors,
        num_warps=8,
        tile_tokens=64,
        num_stages=3,
        most_pieces=max(1, min(_MOST_PIECES, target.multiprocessors // num_kv_heads)),
    )


def tilings(launch: Launch, weights: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> Tilings:
    """All inputs a task where outputs are many, splits of them where they are few."""
    width, num_kv_heads, heads, head_dim = weights["qkv"].shape
    mlp = weights["down"].shape[0]
    return Tilings(
        qkv=_whole(launch, width, num_kv_heads * heads * head_dim, gated=False),
        o=_split(launch, num_kv_heads * (heads - 2) * head_dim, width),
        gate_up=_whole(launch, width, mlp, gated=True),
        down=_split(launch, mlp, width),
    )


def _whole(launch: Launch, inputs: int, outputs: int, *, gated: bool) -> Tiling:
    cols = ceil_div(ceil_div(outputs, launch.programs), 8) * 8
    return Tiling(inputs, outputs, cols, next_power_of_2(cols) * (1 + gated), 1)


def _split(launch: Launch, inputs: int, outputs: int) -> Tiling:
    splits = max(1, min(launch.programs // ceil_div(outputs, _SPLIT_COLS), inputs // _LEAST_SPLIT))
    return Tiling(inputs, outputs, _SPLIT_COLS, _SPLIT_COLS, splits)
