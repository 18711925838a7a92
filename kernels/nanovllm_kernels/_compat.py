"""The one place that knows the installed versions of jax, triton and jax-triton, and the GPU that is meant.

`_streaming.py` alone changes jax elsewhere, and does without where it does not find what it changes.

Nothing here imports triton until a Triton kernel is called, so the XLA implementations work without it.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

# What `triton.backends.nvidia.driver` calls the TMA data type TF32 since triton 3.7 (CUtensorMapDataType).
_TMA_TF32 = 11


@dataclass(frozen=True)
class Target:
    """The GPU that kernels are compiled for; launch parameters depend on nothing else about the machine.

    `compute_capability` is 90 for sm_90; `shared_bytes` is the most shared memory one block may use; `kind` is the
    device's name, which tuned launch parameters are kept under.
    """

    compute_capability: int
    multiprocessors: int
    shared_bytes: int
    kind: str = ""


# Shared memory a block may opt in to: CUDA C++ Programming Guide, technical specifications per compute
# capability. Multiprocessors of the largest common part, for lowering without a device:
# A100, A10/RTX 3090, RTX 4090, H100/H200, B200, RTX PRO 6000.
_KNOWN_TARGETS = {
    80: Target(80, 108, 163 * 1024),
    86: Target(86, 82, 99 * 1024),
    89: Target(89, 128, 99 * 1024),
    90: Target(90, 132, 227 * 1024, "NVIDIA H200"),
    100: Target(100, 148, 227 * 1024),
    120: Target(120, 188, 99 * 1024),
}
_SMALLEST_SHARED_BYTES = 99 * 1024

_lowering_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar(
    "nanovllm_kernels_lowering_target", default=None
)


@contextlib.contextmanager
def lowering_for(gpu: int | Target) -> Iterator[Target]:
    """Compiles Triton kernels for a GPU, or for a compute capability (80, 86, 89, 90, ...), instead of the one at hand.

    Works on a machine without a GPU, with the CUDA plugin, triton and jax-triton installed::

        with lowering_for(90):
            traced = jax.jit(lambda *xs: paged_decode(*xs, scale=1.0, backend="triton")).trace(*args)
            traced.lower(lowering_platforms=("cuda",))

    The capability is read while a function is traced, and `jax.jit` keeps traces: lower a fresh function
    for each capability.
    """
    target = gpu if isinstance(gpu, Target) else _KNOWN_TARGETS.get(gpu)
    if target is None:
        raise ValueError(f"compute_capability is {gpu}; known ones are {sorted(_KNOWN_TARGETS)} (90 stands for sm_90).")
    token = _lowering_target.set(target)
    try:
        yield target
    finally:
        _lowering_target.reset(token)


def current_target() -> Target:
    """The GPU that a kernel traced now is compiled for: that of `lowering_for`, else the first local one."""
    if (target := _lowering_target.get()) is not None:
        return target
    for device in jax.local_devices():
        if device.platform == "gpu":
            capability = int(device.compute_capability.replace(".", ""))
            known = _KNOWN_TARGETS.get(capability)
            return Target(
                compute_capability=capability,
                multiprocessors=device.core_count,
                shared_bytes=known.shared_bytes if known else _SMALLEST_SHARED_BYTES,
                kind=device.device_kind,
            )
    raise RuntimeError(
        f"The GPU backends need an NVIDIA GPU, but the devices are {jax.local_devices()}; use "
        "backend='xla', or lower without running under nanovllm_kernels.lowering_for(compute_capability)."
    )


@cache
def import_jax_triton() -> ModuleType:
    """jax_triton, made to work with triton 3.6 and jax 0.12 too; call it before any module that imports triton.

    jax-triton 0.4.1 reads a constant that triton has only since 3.7; without it, it takes the whole NVIDIA
    back end for missing and fails at lowering. Its rule for dead code elimination lacks an argument that jax 0.12
    added; the rule given here says the same: a kernel call stays, with all its inputs. Triton 3.9 asks to be told
    that products and sums are fused, as they are in all versions so far. What else is changed: `_own_function`.

    Raises:
        ImportError: with the remedy, if triton or jax-triton is missing.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # half of a kernel's PTX; see `_compact`
    try:
        driver = importlib.import_module("triton.backends.nvidia.driver")
        if not hasattr(driver, "TMA_TF32"):
            driver.TMA_TF32 = _TMA_TF32  # pyright: ignore[reportAttributeAccessIssue]
        jax_triton = importlib.import_module("jax_triton")
        library = importlib.import_module("jax_triton.triton_lib")
        library.TritonFunction = _own_function(library)  # pyright: ignore[reportAttributeAccessIssue]
        if jax.__version_info__ >= (0, 12):
            library.pe.dce_rules[library.triton_kernel_call_p] = lambda used_outs, *rest: (
                [True] * len(rest[-1].invars),
                rest[-1],
            )
        return jax_triton
    except ImportError as error:
        raise ImportError(
            f"backend='triton' needs triton and jax-triton, but importing them failed ({error}); install "
            "'nanovllm-jax[cuda13]' (or cuda12), or use backend='xla'."
        ) from error


def _own_function(library: ModuleType) -> type:
    """jax-triton's class for a kernel, with one compilation of each, and what a call carries made small.

    Threads that lower at the same time and need the same kernel would each compile it, for a second or more: here the
    others wait for the first.

    A call carries its kernel's PTX and Triton IR, compressed. Before each launch of a program, graphs included, jaxlib
    hashes all that for every call, under one lock for all GPUs: of 9 ms that a decode step of 288 calls took to launch
    on four H100s, 6. So comments and line numbers are left out, and the IR is kept here.
    """
    locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    class OwnFunction(library.TritonFunction):
        def get_or_create_kernel(self, *args: Any, **options: Any) -> Any:
            constants = repr((self.name, args[-1], options["metaparams"], options["backend_options"]))
            with locks[constants]:
                return super().get_or_create_kernel(*args, **options)

        def _compile_kernel(self, spec: Any, target: Any, backend: Any, options: Any) -> Any:
            _, ir, *rest, result = super()._compile_kernel(spec, target, backend, options)
            scratch = getattr(result, "global_scratch_size", None)
            ptx = _compact(result.binary)
            _ir_of_ptx[ptx] = ir
            kernel = library.triton_kernel_call_lib.TritonKernel(
                result.name,
                options["num_warps"],
                options["num_ctas"],
                result.shared_mem_bytes,
                ptx,
                "",
                target.arch,
                *(() if scratch is None else (scratch, result.global_scratch_align)),
            )
            return kernel, ir, *rest, result

    return OwnFunction


_ir_of_ptx: dict[str, str] = {}


def triton_ir(ptx: str) -> str:
    """The Triton IR of a kernel that this process has lowered to PTX, else nothing."""
    return _ir_of_ptx.get(ptx, "")


def _compact(ptx: str) -> str:
    """PTX without comments, indentation and empty lines."""
    # Of lines with a string, such as the name of a file, nothing is cut off.
    lines = ((line if '"' in line else line.partition("//")[0]).strip() for line in ptx.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def import_compilers() -> None:
    """Import what lowers Triton's and Mosaic's kernels, of what is installed; else the first kernel of each does."""
    with contextlib.suppress(ImportError):
        import_jax_triton()
    with contextlib.suppress(ImportError):
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def register_gpu_runtimes() -> None:
    """Make known to XLA what Triton's and Mosaic's kernels call at run time; lowering such a kernel does as much.

    A program that was compiled by another process needs it before it is loaded: without it a Mosaic kernel fails with
    "Symbols not found: mosaic_gpu_init_tma_desc", a Triton kernel for want of its call target.
    """
    with contextlib.suppress(ImportError):  # without JAX's plugin for CUDA there is nothing to make known
        importlib.import_module("jaxlib.gpu_triton")
        # As `jax.experimental.mosaic.gpu.core` does, whose import takes a second, for all that lowers kernels.
        extension = importlib.import_module("jax._src.lib.mosaic_gpu")._mosaic_gpu_ext
        library = Path(extension.__file__).with_name("libmosaic_gpu_runtime.so")
        if library.exists():
            os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(library)


def triton_call(
    *args: Any,
    kernel: Any,
    out_type: Any,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> Any:
    """Launches the Triton function `kernel` over `grid`; `constants` are its constexpr arguments.

    `args` are arrays, scalars, and `jax.Ref`s that the kernel updates in place; one pointer for each leaf of
    `out_type` follows them. Returns arrays of `out_type`.
    """
    return import_jax_triton().triton_call(
        *args,
        kernel=kernel,
        out_type=out_type,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=current_target().compute_capability,
        **constants,
    )


def update_in_place(launch: Callable[..., object], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Calls `launch` on a mutable reference to each array and returns the arrays as it left them.

    Inside jit the references become input-output aliases, so a donated array keeps its buffer.
    """
    refs = [jax.new_ref(array) for array in arrays]
    launch(*refs)
    return tuple(jax.freeze(ref) for ref in refs)
