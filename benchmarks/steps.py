"""A batch's first token and its tokens after that, from two `generate` calls on prompts of one length.

A decode step is (time for n tokens - time for 1) / (n - 1), so an average over n - 1 contexts from the prompt's on.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from engine_process import EngineProcess
from limit import Ceilings, Shape, ceilings_for, decode_seconds, kv_cache_bytes, prefill_seconds, shape_of
from models import config_of
from workloads import uniform

from nanovllm_jax.inspection.gpus import gpu_of_device


@dataclass(frozen=True)
class Cell:
    """`batch` prompts of `context` ids up to `max_token_id`, `new_tokens` out of each.

    `index` keeps the draws of cells apart.
    """

    index: int
    batch: int
    context: int
    new_tokens: int
    max_token_id: int


@dataclass(frozen=True)
class StepTimes:
    """Seconds until every row has its first token, and from token to token after that."""

    first_token: float
    per_token: float


def measure_steps(process: EngineProcess, cell: Cell, repeat: int) -> StepTimes:
    """Times both calls, each on prompts that nothing has in a cache."""
    seed = 1000 + 2 * (1000 * cell.index + repeat)
    one, many = (
        process.run(uniform(seed + i, cell.batch, cell.context, new_tokens, cell.max_token_id)).seconds
        for i, new_tokens in enumerate((1, cell.new_tokens))
    )
    return StepTimes(one, (many - one) / (cell.new_tokens - 1))


def least_times(shape: Shape, ceilings: Ceilings, cell: Cell) -> StepTimes:
    """What the device allows."""
    later = range(1, cell.new_tokens)
    steps = (decode_seconds(shape, ceilings, cell.batch, cell.batch * (cell.context + i)) for i in later)
    return StepTimes(
        prefill_seconds(shape, ceilings, [(0, cell.context)] * cell.batch), sum(steps) / (cell.new_tokens - 1)
    )


def fits(process: EngineProcess, cell: Cell, args: argparse.Namespace, num_devices: int) -> bool:
    """Whether all rows of a cell have room beside each other: else some wait, and its times are not those of a batch.

    Engines use nine tenths of the memory; a tenth of the rest is left for temporaries. True where sizes are not known.
    """
    config, gpu = config_of(args.model), gpu_of_device(process.device)
    if not config or not gpu:
        return True
    shape = shape_of(config, kv_cache_bytes=kv_cache_bytes(process.spec.options))
    cache = cell.batch * (cell.context + cell.new_tokens) * shape.kv_bytes
    return shape.step_bytes + cache <= 0.8 * gpu.memory_bytes * num_devices


def limits(process: EngineProcess, cell: Cell, args: argparse.Namespace, num_devices: int) -> StepTimes | None:
    """`least_times` of the model on the devices of the process; None if the model or their ceilings are not known."""
    config, ceilings = config_of(args.model), ceilings_for(process.device, args.ceilings)
    if not config or not ceilings:
        return None
    shape = shape_of(config, kv_cache_bytes=kv_cache_bytes(process.spec.options))
    return least_times(shape, ceilings.of_devices(num_devices), cell)
