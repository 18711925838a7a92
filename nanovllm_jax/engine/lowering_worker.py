"""A process that lowers an engine's programs for a GPU that it does not use; `step.lowering` starts it."""

from __future__ import annotations

import os
import pickle
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

import jax
import jax.numpy as jnp

from nanovllm_jax.config import EngineConfig, ModelConfig
from nanovllm_jax.engine.plan import abstract_weights, describe_programs
from nanovllm_jax.parallel.collectives import exchange_params
from nanovllm_jax.parallel.mesh import make_mesh
from nanovllm_jax.step.catalogue import Catalogue
from nanovllm_jax.step.lowering import Lowered
from nanovllm_jax.step.state import StateShape
from nanovllm_kernels._compat import Target, lowering_for


@dataclass(frozen=True)
class LoweringOrder:
    """What the programs are described by, and the GPU they are for."""

    model: ModelConfig  # its heads already split over the mesh
    config: EngineConfig
    shape: StateShape
    weight_dtype: jnp.dtype
    kv_dtype: jnp.dtype
    target: Target | None  # None: the CPU
    exchanged: bool = False  # whether shards sum through each other's memory

    def catalogue(self) -> Catalogue:
        """The programs of one replica, over devices of this process that stand for its GPUs."""
        mesh = make_mesh(self.config.tensor_parallel_size, 1)
        weights = abstract_weights(self.model, self.weight_dtype, mesh)
        weights |= exchange_params(mesh, exchanged=self.exchanged, abstract=True)
        on_gpu = self.target is not None
        return describe_programs(self.model, self.config, self.shape, weights, self.kv_dtype, mesh, on_gpu=on_gpu)


def main() -> None:
    """Answer each key that comes in until no more do, or nobody reads the answers."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the replies
    try:
        answer(requests, replies)
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):
        os._exit(0)  # not through the end of Python, which would flush what nobody reads and complain


def answer(requests: BinaryIO, replies: BinaryIO) -> NoReturn:
    """Lower what comes in.

    Raises:
        EOFError, UnpicklingError: at its end, which may come inside an order.
        BrokenPipeError: if nobody reads the answers.
    """
    order: LoweringOrder = pickle.load(requests)
    jax.config.update("jax_num_cpu_devices", order.config.tensor_parallel_size)
    jax.config.update("jax_export_ignore_forward_compatibility", True)  # the same version compiles it
    catalogue, platform = order.catalogue(), "cuda" if order.target else "cpu"
    with lowering_for(order.target) if order.target else nullcontext():
        while True:
            key = pickle.load(requests)
            started = time.perf_counter()
            exported = catalogue.export(key, platform)
            pickle.dump(Lowered(exported, time.perf_counter() - started), replies)
            replies.flush()


if __name__ == "__main__":
    main()
