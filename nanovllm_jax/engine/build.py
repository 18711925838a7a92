"""Start-up: from a model's name to an engine whose programs are compiled and whose cache is allocated."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.topologies import TopologyDescription
from jax.sharding import Mesh

from nanovllm_jax.config import EngineConfig, ModelConfig
from nanovllm_jax.engine.compile_worker import CompileOrder
from nanovllm_jax.engine.engine import Engine
from nanovllm_jax.engine.plan import (
    abstract_weights,
    cache_dtype,
    describe_programs,
    scheduler_limits,
    smallest_shape,
    weight_dtype,
)
from nanovllm_jax.engine.replica import Replica
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.errors import DeviceError
from nanovllm_jax.models.params import Params, param_bytes, random_params
from nanovllm_jax.parallel.collectives import can_exchange, check_exchange, exchange_params
from nanovllm_jax.parallel.mesh import check_devices, make_mesh, param_shardings, replica_meshes, split_heads
from nanovllm_jax.step.catalogue import Catalogue
from nanovllm_jax.step.compile_workers import CompileWorkers, compile_server
from nanovllm_jax.step.fork_server import ForkServer
from nanovllm_jax.step.memory import (
    DeviceMemory,
    allow_device_memory,
    blocks_that_fit,
    claim_device_memory,
    device_memory,
    expected_temporary_bytes,
    largest_programs,
    temporary_bytes,
)
from nanovllm_jax.step.programs import Programs, cache_folder, use_persistent_cache
from nanovllm_jax.step.runner import Runner
from nanovllm_jax.step.state import StateShape, block_bytes, device_bytes
from nanovllm_jax.weights import (
    GenerationDefaults,
    ModelSource,
    load_generation_defaults,
    load_model_config,
    load_params,
    load_tokenizer,
    locate,
)
from nanovllm_kernels._compat import current_target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """A running engine and what it was made from."""

    engine: Engine
    source: ModelSource
    model_config: ModelConfig
    shape: StateShape
    defaults: GenerationDefaults


def build_engine(model: str | None, tokenizer: str | None, config: EngineConfig, *, skip_tokenizer: bool) -> Built:
    """Load a model and make its engine.

    Raises:
        ConfigError: for unsupported models or arguments.
        WeightsError: for missing, left-over or corrupt weights.
        DeviceError: if the device is missing or too small.
    """
    allow_device_memory(config.gpu_memory_utilization)
    source = locate(model)
    whole, defaults = load_model_config(source), load_generation_defaults(source)
    # What cannot be is told before anything slow is begun.
    if config.tensor_parallel_size * config.data_parallel_size > 1:
        _check_gpu_is_used()
        check_devices(config.tensor_parallel_size, config.data_parallel_size)
    model_config = split_heads(whole, config.tensor_parallel_size)
    smallest_shape(model_config, config)
    use_persistent_cache()
    with compile_server("nanovllm_jax.engine.compile_worker") as server, ThreadPoolExecutor(2) as pool:
        if config.compiles_at_start and _must_compile():
            server.start()  # it imports while JAX starts the device
        # The tokenizer and the weights are read while JAX starts the device and programs are loaded or compiled.
        reading = None if skip_tokenizer else pool.submit(load_tokenizer, tokenizer or source)
        _check_gpu_is_used()
        mesh = make_mesh(config.tensor_parallel_size, config.data_parallel_size)
        meshes = replica_meshes(mesh)
        dtype = weight_dtype(config.dtype, model_config, on_gpu=mesh.devices.flat[0].platform != "cpu")
        exchanged = all(map(can_exchange, meshes))
        memory = device_memory(list(mesh.devices.flat))  # before loading: a shape must not depend on the moment
        loading = pool.submit(_load, source, model_config, dtype, mesh, config)
        planned = model_config, config, dtype, meshes, exchanged, memory, server
        programs, shape = _plan(*planned)
        for future in (reading, loading):
            if future and future.done():
                future.result()  # raises at once what is wrong with the tokenizer or the weights
        _compile(programs, config)
        needed = temporary_bytes(programs[0]) if _is_estimated(config, mesh.devices.flat[0]) else 0
        if needed > expected_temporary_bytes(programs[0].catalogue):
            logger.warning("programs need %.2f GB beside the cache: compiling for fewer blocks", needed / 1e9)
            programs, shape = _plan(*planned, temporary=needed)
            _compile(programs, config)
        words = reading.result() if reading else None
        weights = [
            params | exchange_params(replica_mesh, exchanged=exchanged)
            for params, replica_mesh in zip(loading.result(), meshes, strict=True)
        ]
        runners = [Runner(*pair) for pair in zip(programs, weights, strict=True)]
    if compiled := config.compiles_at_start:
        _warm_up(runners)
        for params in weights:
            check_exchange(params)
    _log_holdings(mesh, programs[0].catalogue)
    limits = scheduler_limits(model_config, config, shape, programs[0].catalogue.config.decode_steps)
    engine = Engine(
        [Replica(Scheduler(limits), runner, None if compiled else runner.compile) for runner in runners],
        words,
        eos_token_ids=_end_ids(words, defaults),
        vocab_size=model_config.vocab_size,
        max_logprobs=programs[0].catalogue.num_logprobs,
        seed=config.seed,
    )
    # What lives as long as the process: a collection that walks over it stops the loop for up to 0.1 s.
    gc.collect()
    gc.freeze()
    return Built(engine, source, whole, shape, defaults)


def _load(source: ModelSource, model: ModelConfig, dtype: Any, mesh: Mesh, config: EngineConfig) -> list[Params]:
    """The weights of each replica: the first one's are read, the others' copied from device to device."""
    claim_device_memory(mesh)
    meshes = replica_meshes(mesh)
    start, (first, *others) = time.perf_counter(), (param_shardings(model, replica) for replica in meshes)
    if config.load_format == "dummy":
        params = random_params(model, dtype, config.seed or 0, first)
    else:
        params = load_params(source, model, dtype, first)
    copies = jax.block_until_ready([jax.device_put(params, shardings) for shardings in others])
    size, seconds = param_bytes(model, dtype) / 1e9, time.perf_counter() - start
    device = mesh.devices.flat[0]
    logger.info("%s on %s: %.2f GB of %s weights in %.1f s", source.name, device.device_kind, size, dtype, seconds)
    return [params, *copies]


def _plan(
    model: ModelConfig,
    config: EngineConfig,
    dtype: jnp.dtype,
    meshes: Sequence[Mesh],
    exchanged: bool,
    memory: DeviceMemory,
    server: ForkServer,
    temporary: int | None = None,
) -> tuple[list[Programs], StateShape]:
    """Choose the number of cache blocks and describe each replica's programs for it.

    Of `memory`, `temporary` bytes are the programs', which `server` compiles on GPUs.
    """
    devices, kv_dtype = list(meshes[0].devices.flat), cache_dtype(config, dtype)
    on_gpu = devices[0].platform != "cpu"
    one_block = block_bytes(model, config.block_size, kv_dtype) // config.tensor_parallel_size
    shape = smallest_shape(model, config)
    max_model_len = shape.max_model_len

    def programs(shape: StateShape, mesh: Mesh) -> Programs:
        weights = abstract_weights(model, dtype, mesh)
        weights |= exchange_params(mesh, exchanged=exchanged, abstract=True)
        catalogue = describe_programs(model, config, shape, weights, kv_dtype, mesh, on_gpu=on_gpu)
        # On a CPU XLA's own cache does as much for one replica; others take what the first one compiled.
        kept_in = _kept() if on_gpu or len(meshes) > 1 else None
        workers = None
        if on_gpu:
            topology, ids = TopologyDescription(devices).serialize(), tuple(device.id for device in devices)
            target = current_target()
            order = CompileOrder(model, config, shape, dtype, kv_dtype, exchanged, target, topology, ids)
            workers = CompileWorkers(server, order)
        return Programs(catalogue, command_buffers=not config.enforce_eager, kept_in=kept_in, workers=workers)

    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
    else:
        trial = programs(shape, meshes[0]).catalogue
        state = (trial.params, trial.rows, trial.extras)
        num_blocks = blocks_that_fit(
            memory,
            fixed_bytes=device_bytes(state),
            temporary=expected_temporary_bytes(trial) if temporary is None else temporary,
            block_bytes=one_block,
            gpu_memory_utilization=config.gpu_memory_utilization,
        )
        if not on_gpu:
            num_blocks = min(num_blocks, config.max_num_seqs * shape.blocks_per_row)
    capacity = num_blocks * config.block_size
    if num_blocks < config.max_num_seqs:
        given = config.num_gpu_blocks_override is not None
        remedy = "num_gpu_blocks_override" if given else "gpu_memory_utilization"
        raise DeviceError(
            f"The KV cache has {num_blocks} blocks of {one_block / 1e6:.2f} MB, fewer than one for each of the "
            f"max_num_seqs {config.max_num_seqs} requests: raise {remedy} or lower max_num_seqs."
        )
    if capacity < max_model_len:
        if config.max_model_len is not None and config.num_gpu_blocks_override is None:
            raise DeviceError(
                f"The KV cache holds {capacity} tokens, less than one request of max_model_len {max_model_len}: "
                "raise gpu_memory_utilization or lower max_model_len."
            )
        logger.warning("max_model_len is lowered from %d to the cache's %d tokens", max_model_len, capacity)
        max_model_len = capacity
    shape = replace(shape, num_blocks=num_blocks, max_model_len=max_model_len)
    logger.info(
        "KV cache: %d tokens in %d blocks, %.2f GB of %s; %.1f requests of %d tokens at once",
        capacity,
        num_blocks,
        num_blocks * one_block / 1e9,
        kv_dtype,
        capacity / max_model_len,
        max_model_len,
    )
    return [programs(shape, mesh) for mesh in meshes], shape


def _is_estimated(config: EngineConfig, device: Any) -> bool:
    """Whether the number of blocks depends on an estimate of the programs' temporary memory."""
    return device.platform != "cpu" and config.num_gpu_blocks_override is None


def _compile(programs: Sequence[Programs], config: EngineConfig) -> None:
    """Have every program; without `compiles_at_start` those alone that tell how much memory they need.

    The first replica's are compiled if need be, the others' are loaded from what it kept.
    """
    start, (first, *others) = time.perf_counter(), programs
    if config.compiles_at_start:
        first.compile_all()
    elif _is_estimated(config, first.catalogue.mesh.devices.flat[0]):
        first.compile(largest_programs(first.catalogue))
    log = first.compile_log
    hits, seconds = sum(record.cache_hit for record in log), time.perf_counter() - start
    logger.info("compiled %d programs in %.1f s, %d of them from the cache", len(log), seconds, hits)
    if others and config.compiles_at_start:
        start = time.perf_counter()
        for replica in others:
            replica.compile_all()
        log, seconds = [record for replica in others for record in replica.compile_log], time.perf_counter() - start
        hits = sum(record.cache_hit for record in log)
        logger.info("loaded them for %d more replicas in %.1f s, %d of %d kept", len(others), seconds, hits, len(log))


def _warm_up(runners: Sequence[Runner]) -> None:
    start = time.perf_counter()
    with ThreadPoolExecutor(len(runners)) as pool:
        list(pool.map(Runner.warm_up, runners))
    logger.info("ran every step once in %.1f s", time.perf_counter() - start)


def _log_holdings(mesh: Mesh, catalogue: Catalogue) -> None:
    """Say which devices form the mesh and what each of them holds."""
    sizes = ", ".join(f"{size} {name}" for name, size in mesh.shape.items())
    params, caches, rows = (device_bytes(tree) / 1e9 for tree in (catalogue.params, catalogue.caches, catalogue.rows))
    logger.info(
        "mesh of %d x %s (%s): each device holds %.2f GB of weights, %.2f GB of KV cache and %.3f GB of row state",
        mesh.size,
        mesh.devices.flat[0].device_kind,
        sizes,
        params,
        caches,
        rows,
    )
    for index, devices in enumerate(mesh.devices):
        logger.info("replica %d: %s", index, ", ".join(map(str, devices)))


def _end_ids(tokenizer: Any | None, defaults: GenerationDefaults) -> frozenset[int]:
    own = tokenizer.eos_token_id if tokenizer is not None else None
    return frozenset(defaults.eos_token_ids) | ({own} if own is not None else set())


def _kept() -> Path:
    """The folder of whole programs."""
    return cache_folder() / "executables"


def _gpu_is_meant() -> bool:
    """Whether there is an NVIDIA GPU, and JAX is not told to leave it alone."""
    return "cpu" not in (jax.config.jax_platforms or "") and Path("/proc/driver/nvidia/gpus").exists()


def _must_compile() -> bool:
    """Whether it is sure, before JAX has started a GPU, that its programs are not there yet."""
    return _gpu_is_meant() and not any(_kept().glob("*"))


def _check_gpu_is_used() -> None:
    """Refuse to crawl along on the CPU beside an idle GPU, unless told to.

    Raises:
        DeviceError: naming what to install.
    """
    if jax.default_backend() == "cpu" and _gpu_is_meant():
        raise DeviceError(
            "An NVIDIA GPU is present, but JAX has no plugin for it and would run on the CPU: install "
            "nanovllm-jax[cuda13] (driver 580 or newer) or nanovllm-jax[cuda12], or set JAX_PLATFORMS=cpu."
        )
