"""How a layer is cut over programs: launch parameters and the tiles of its four products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jax import Array

from nanovllm_kernels._compat import Target
from nanovllm_kernels._device import ceil_div, next_power_of_2

_LEAST_SPLIT = 256  # inputs a program: below, adding the splits costs more than the products
_BULK_PREFETCH = 90  # compute capability of the first GPUs that read a range ahead in one instruction


@dataclass(frozen=True)
class Launch:
    """Launch parameters.

    `programs` must all be resident at once. Inputs are cut into `slices` that warps multiply apart (1 for one row,
    which does without tensor cores); `tile_inputs` are multiplied at a time. A task of a product has at most
    `most_cols` outputs. Contexts are cut into at most `most_pieces` + rows pieces of whole tiles of `tile_tokens`.
    """

    programs: int
    tile_rows: int
    slices: int
    num_warps: int
    tile_tokens: int
    stages: int
    tile_inputs: int
    most_cols: int
    most_pieces: int
    read_ahead: int


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

    def constants(self, name: str) -> dict[str, int]:
        """The kernels' constexpr arguments."""
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
class Tilings:
    """Those of a layer's four products."""

    qkv: Tiling
    o: Tiling
    gate_up: Tiling
    down: Tiling

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' constexpr arguments."""
        named = {"QKV": self.qkv, "O": self.o, "GATE_UP": self.gate_up, "DOWN": self.down}
        return {key: value for name, tiling in named.items() for key, value in tiling.constants(name).items()}


def launch_parameters(target: Target, num_rows: int, num_kv_heads: int) -> Launch:
    """One program of eight warps a multiprocessor, which may then use all its registers."""
    wanted = max(1, target.multiprocessors // num_kv_heads)
    return Launch(
        programs=target.multiprocessors,
        tile_rows=1 if num_rows == 1 else max(16, next_power_of_2(num_rows)),
        slices=1 if num_rows == 1 else 8,
        num_warps=8,
        tile_tokens=64,
        stages=3,
        tile_inputs=1024 if num_rows <= 16 else 256,
        most_cols=32,
        # Each piece of a single row's context is a program's only one, and 16 are read by each that merges them.
        most_pieces=min(16, wanted) if num_rows == 1 else wanted,
        read_ahead=1 if target.compute_capability >= _BULK_PREFETCH else 0,
    )


def tilings(launch: Launch, weights: Mapping[str, Array]) -> Tilings:
    """The tiles of each product: all inputs where outputs are many, splits of them where they are few."""
    width, num_kv_heads, heads, head_dim = weights["qkv"].shape
    mlp = weights["down"].shape[0]
    # Gate and up columns are a tile together.
    gated = replace(launch, most_cols=max(8, launch.most_cols * 3 // 4))
    return Tilings(
        qkv=_whole(launch, width, num_kv_heads * heads * head_dim),
        o=_split(launch, num_kv_heads * (heads - 2) * head_dim, width),
        gate_up=_whole(gated, width, mlp, gated=True),
        down=_split(launch, mlp, width),
    )


def _whole(launch: Launch, inputs: int, outputs: int, *, gated: bool = False) -> Tiling:
    """Tasks that have all inputs: as many outputs each as fill the programs in the fewest rounds."""
    rounds = ceil_div(outputs, launch.programs * launch.most_cols)
    cols = min(launch.most_cols, ceil_div(ceil_div(outputs, launch.programs * rounds), 8) * 8)
    tile_inputs = min(launch.tile_inputs, next_power_of_2(inputs))
    return Tiling(inputs, outputs, cols, next_power_of_2(cols) * (1 + gated), tile_inputs, 1, inputs)


def _split(launch: Launch, inputs: int, outputs: int) -> Tiling:
    """Tasks of as many outputs as may be, and as many splits of the inputs as there are programs for them."""
    whole = _whole(replace(launch, programs=1), inputs, outputs)
    splits = max(1, min(launch.programs // whole.tasks, inputs // _LEAST_SPLIT))
    split_inputs = ceil_div(inputs, splits * 16) * 16
    tile_inputs = min(launch.tile_inputs, next_power_of_2(split_inputs))
    return replace(whole, tile_inputs=tile_inputs, splits=splits, split_inputs=split_inputs)
