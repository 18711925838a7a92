"""How many cache blocks the device holds: computed from shapes and checked once compiled, not found by running out."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanovllm_jax.errors import DeviceError
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.draw import LOGPROB_CHUNK
from nanovllm_jax.step.programs import Programs

logger = logging.getLogger(__name__)

# Command buffers, collectives' buffers and the allocator's rounding.
RESERVE_BYTES = 1 << 30
# What cuBLAS may use beside its operands: 32 MB for products on Hopper, twice that to be sure.
WORKSPACE_BYTES = 64 << 20
# Block counts are multiples of this, so that a start finds the programs that the last start compiled.
BLOCK_MULTIPLE = 256
# Host memory that the cache may take where there is no GPU.
CPU_CACHE_BYTES = 2 << 30


def allow_device_memory(gpu_memory_utilization: float) -> None:
    """Tell XLA how much of the GPU's memory it may take; only heard before the first use of a device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{gpu_memory_utilization:.3f}")


def claim_device_memory(mesh: Mesh) -> None:
    """Have XLA take what it may, as it does before the first allocation: two seconds for 135 GB (H200).

    A transfer or a question about memory would hold up all of Python meanwhile; a running program does not.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    jax.block_until_ready(jax.jit(lambda: jnp.zeros(()), out_shardings=sharding)())


def largest_programs(catalogue: Catalogue) -> list[ProgramKey]:
    """The programs among which the hungriest is."""
    rows, tokens = catalogue.decode_sizes[-1], catalogue.prefill_sizes[-1]
    return [
        ProgramKey("prefill", tokens),
        ProgramKey("decode", rows),
        ProgramKey("full", rows),
        ProgramKey("prompt_logprobs", tokens),
    ]


def expected_temporary_bytes(catalogue: Catalogue) -> int:
    """A generous estimate of `temporary_bytes`, from shapes alone: compiling to find out would delay other programs.

    A prefill holds the residual stream, the projections and the MLP's activations of all its tokens, some of them
    twice; the full sampler and prompt log-probabilities hold their rows' logits at several stages.
    """
    model, tokens = catalogue.config.model, catalogue.prefill_sizes[-1]
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    split = 3 * heads + 4 * model.intermediate_size  # elements a token
    activations = tokens * (4 * model.hidden_size + split // catalogue.mesh.size)
    rows = max(catalogue.decode_sizes[-1], LOGPROB_CHUNK)
    logits = 8 * 4 * rows * model.vocab_size // catalogue.mesh.size
    return max(activations * catalogue.params["embed"].dtype.itemsize, logits) + WORKSPACE_BYTES


def temporary_bytes(programs: Programs) -> int:
    """Bytes beyond weights and state that the hungriest program needs while it runs, which XLA knows."""
    found = 0
    for key in largest_programs(programs.catalogue):
        if analysis := programs[key].memory_analysis():
            output = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
            found = max(found, analysis.temp_size_in_bytes + output)
    return found


class DeviceMemory(NamedTuple):
    """What a mesh's devices have, in bytes: the least that XLA may take of one, and the most that one has given away.

    There is no limit on CPUs.
    """

    limit: int | None
    held: int


def device_memory(devices: Sequence[Any]) -> DeviceMemory:
    """Ask XLA's allocators; ask before an engine loads anything: what is held then is others'."""
    answers = [device.memory_stats() or {} for device in devices]
    limits = [answer["bytes_limit"] for answer in answers if "bytes_limit" in answer]
    return DeviceMemory(min(limits, default=None), max(answer.get("bytes_in_use", 0) for answer in answers))


def blocks_that_fit(
    memory: DeviceMemory,
    *,
    fixed_bytes: int,
    temporary: int,
    block_bytes: int,
    gpu_memory_utilization: float,
) -> int:
    """Blocks that fit beside weights, device state and temporaries.

    Args:
        memory: of the devices before anything was loaded; another engine of this process may hold some.
        fixed_bytes: weights and all other device state.
        temporary: what `temporary_bytes` gives, or is expected to.
        block_bytes: K and V of one block over all layers, on one device.
        gpu_memory_utilization: what the user asked for; a budget that differs (the back end was already running)
            is warned of.

    Raises:
        DeviceError: if not even one multiple of blocks fits.
    """
    limit, held_by_others = memory
    if limit is None:
        return max(CPU_CACHE_BYTES // block_bytes, 1)
    asked = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    if asked != f"{gpu_memory_utilization:.3f}":
        logger.warning(
            "gpu_memory_utilization is %.3f but the device's memory was already claimed: %.1f GB are available. "
            "Create the LLM before other JAX work, or unset XLA_PYTHON_CLIENT_MEM_FRACTION.",
            gpu_memory_utilization,
            limit / 1e9,
        )
    free = limit - held_by_others - fixed_bytes - temporary - RESERVE_BYTES
    blocks = free // block_bytes // BLOCK_MULTIPLE * BLOCK_MULTIPLE
    if blocks < BLOCK_MULTIPLE:
        others = (
            f" {held_by_others / 1e9:.1f} GB are held by others in this process, such as an LLM that was not closed."
        )
        raise DeviceError(
            f"{limit / 1e9:.1f} GB of device memory hold {fixed_bytes / 1e9:.1f} GB of weights and state and "
            f"{temporary / 1e9:.1f} GB of temporaries, but not {BLOCK_MULTIPLE} cache blocks of "
            f"{block_bytes / 1e6:.1f} MB: raise gpu_memory_utilization, lower max_num_batched_tokens or "
            f"max_num_seqs, or use a smaller model.{others if held_by_others else ''}"
        )
    return blocks
