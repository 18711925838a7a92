"""Processes that compile an engine's programs for a GPU that they do not use; `step.compile_workers` asks them to."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.topologies import TopologyDescription
from jax.sharding import Mesh

from nanovllm_jax.config import EngineConfig, ModelConfig
from nanovllm_jax.engine.plan import abstract_weights, describe_programs
from nanovllm_jax.parallel.collectives import exchange_params
from nanovllm_jax.parallel.mesh import make_mesh
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.compile_workers import Made
from nanovllm_jax.step.executables import pack
from nanovllm_jax.step.fork_server import serve
from nanovllm_jax.step.state import StateShape
from nanovllm_jax.step.xla_options import engine_options, program_options
from nanovllm_kernels._compat import Target, import_compilers, lowering_for


@dataclass(frozen=True)
class CompileOrder:
    """What the programs are described by, and the GPUs they are for.

    Attributes:
        model: its heads already split over the mesh.
        config: the engine's arguments.
        shape: of the device state.
        weight_dtype: of the weights.
        kv_dtype: of the cache.
        exchanged: whether shards sum through each other's memory.
        target: what kernels are compiled for; None for the CPU.
        topology: what XLA compiles for, serialised; None for this machine's CPU.
        device_ids: the mesh's devices in it.
    """

    model: ModelConfig
    config: EngineConfig
    shape: StateShape
    weight_dtype: jnp.dtype
    kv_dtype: jnp.dtype
    exchanged: bool = False
    target: Target | None = None
    topology: bytes | None = None
    device_ids: tuple[int, ...] = ()

    def catalogue(self) -> Catalogue:
        """The programs of one replica."""
        mesh = self._mesh()
        weights = abstract_weights(self.model, self.weight_dtype, mesh)
        weights |= exchange_params(mesh, exchanged=self.exchanged, abstract=True)
        on_gpu = self.target is not None
        return describe_programs(self.model, self.config, self.shape, weights, self.kv_dtype, mesh, on_gpu=on_gpu)

    def _mesh(self) -> Mesh:
        local = make_mesh(self.config.tensor_parallel_size, 1)  # also starts JAX, which reading a topology needs
        if self.topology is None:
            return local
        by_id = {device.id: device for device in TopologyDescription.deserialize(self.topology).devices}
        devices = np.array([by_id[device_id] for device_id in self.device_ids])
        return Mesh(devices.reshape(local.devices.shape), local.axis_names, axis_types=local.axis_types)


def main() -> NoReturn:
    """Import what compiling takes, for all forks; each then answers keys."""
    # Where PyTorch is installed, Triton imports it, to know tensors from other arguments, which takes five seconds.
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    import_compilers()
    serve(answer)


def answer(asked: Iterator[Any], reply: Callable[[Made], None]) -> None:
    """Compile what is asked for: first comes a `CompileOrder`, then keys, each of which has a `Made` for an answer."""
    order: CompileOrder | None = next(asked, None)
    if order is None:
        return
    jax.config.update("jax_num_cpu_devices", order.config.tensor_parallel_size)
    jax.config.update("jax_enable_compilation_cache", False)  # the engine keeps what it gets
    # Without a GPU XLA takes 0.8 of its memory for all there is, in which the cache does not fit, and would compute
    # things twice that it could keep (35 fusions instead of 24 in a decode step).
    jax.config.update("jax_compiler_enable_remat_pass", False)
    catalogue = order.catalogue()
    options = engine_options(catalogue, command_buffers=not order.config.enforce_eager)
    with lowering_for(order.target) if order.target else nullcontext():
        for key in asked:
            reply(make(catalogue, key, options))


def make(catalogue: Catalogue, key: ProgramKey, options: dict[str, object] | None) -> Made:
    """Trace, lower and compile one program; `options` are those that all share."""
    started = time.perf_counter()
    traced = catalogue.trace(key)
    traced_at = time.perf_counter()
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    compiled = lowered.compile(compiler_options=program_options(catalogue, key, options))
    compile_s = time.perf_counter() - lowered_at
    executable = pack(compiled, list(catalogue.mesh.devices.flat))
    return Made(executable, traced_at - started, lowered_at - traced_at, compile_s)


if __name__ == "__main__":
    main()
