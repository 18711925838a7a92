"""What XLA is told about an engine's programs; all of it is for GPUs."""

from __future__ import annotations

from typing import Any

from nanovllm_jax.models.projections import most_fused_rows
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.prefill import num_parts

_LEAST_TIMED_TOKENS = 2048  # of a prefill
_RECORDED_BY_DEFAULT = "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION"  # in jaxlib 0.11.2


def engine_options(catalogue: Catalogue, *, command_buffers: bool) -> dict[str, Any] | None:
    """Options that all programs share; None on other platforms.

    Args:
        catalogue: the programs.
        command_buffers: whether XLA may record its launches.
    """
    devices = catalogue.mesh.devices
    if devices.flat[0].platform != "gpu":
        return None
    if not command_buffers:
        return {"xla_gpu_enable_command_buffer": ""}
    # Under a profiler XLA would otherwise launch kernel by kernel, and the trace show a step bound by the host.
    options: dict[str, Any] = {"xla_enable_command_buffers_during_profiling": True}
    if devices.size > 1:
        # A collective outside of a graph cuts it in two: a sum of 64 x 4096 then costs two GPUs 32 us, and 11 inside.
        # XLA's own collective kernels, which it prefers, are not recorded; NCCL's are.
        options["xla_gpu_enable_command_buffer"] = f"{_RECORDED_BY_DEFAULT},COLLECTIVES"
        options["xla_gpu_experimental_use_collective_kernels"] = ""
    return options


def program_options(catalogue: Catalogue, key: ProgramKey, shared: dict[str, Any] | None) -> dict[str, Any] | None:
    """Options of one program, over those that all share.

    While it compiles, XLA would also compile and time dozens of its own kernels for each product and two kinds of
    code for each fusion. For the products of long prefills and for the output head it then keeps cuBLAS's kernel, or
    one as fast.
    """
    if shared is None:
        return None
    options: dict[str, Any] = {
        "xla_gpu_experimental_enable_fusion_autotuner": False,
        "xla_gpu_enable_triton_gemm": _tries_own_products(key),
        **shared,
    }
    if _computes_in_parts(catalogue, key):
        options["xla_gpu_enable_command_buffer"] = ""
    return options


def is_timed(key: ProgramKey) -> bool:
    """Whether XLA is to time kernels for a program's products, for which it needs the GPU.

    Without it XLA takes what cuBLAS's heuristics put first, which long prefills should not depend on.
    """
    return _tries_own_products(key) or (key.kind == "prefill" and key.size >= _LEAST_TIMED_TOKENS)


def _tries_own_products(key: ProgramKey) -> bool:
    """Decode steps of many rows gain from XLA's own kernels, where their products are not ours."""
    return key.kind.startswith("decode") and key.size > most_fused_rows()


def _computes_in_parts(catalogue: Catalogue, key: ProgramKey) -> bool:
    """Whether sums of one part of the tokens run beside what another one computes.

    Graphs would run one after the other; and they would have to be updated before the first kernel starts, which
    takes longer than it takes to launch kernels of 100 us one by one.
    """
    return key.kind == "prefill" and num_parts(catalogue.config.axis_name, key.size) > 1
