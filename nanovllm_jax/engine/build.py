"""Start-up: from a model's name to an engine whose programs are compiled and whose cache is allocated."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nanovllm_jax.config import EngineConfig, ModelConfig
from nanovllm_jax.engine.capacity import Planned, plan_programs
from nanovllm_jax.engine.engine import Engine
from nanovllm_jax.engine.plan import weight_dtype
from nanovllm_jax.engine.schedule import SchedulerConfig
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.errors import DeviceError
from nanovllm_jax.models.params import Params, param_bytes, random_params
from nanovllm_jax.parallel.mesh import make_mesh, param_shardings, split_heads
from nanovllm_jax.step.memory import claim_device_memory, largest_programs, temporary_bytes
from nanovllm_jax.step.programs import use_persistent_cache
from nanovllm_jax.step.runner import Runner
from nanovllm_jax.step.state import StateShape
from nanovllm_jax.weights import (
    GenerationDefaults,
    ModelSource,
    load_generation_defaults,
    load_model_config,
    load_params,
    load_tokenizer,
    locate,
)

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
    claim_device_memory(config.gpu_memory_utilization)
    source = locate(model)
    whole, defaults = load_model_config(source), load_generation_defaults(source)
    use_persistent_cache()
    with ThreadPoolExecutor(2) as pool:
        # The tokenizer and the weights are read while JAX starts the device and programs are loaded or compiled.
        reading = pool.submit(lambda: None if skip_tokenizer else load_tokenizer(tokenizer or source))
        _check_gpu_is_used()
        mesh = make_mesh(config.tensor_parallel_size, config.data_parallel_size)
        model_config = split_heads(whole, config.tensor_parallel_size)
        device = mesh.devices.flat[0]
        dtype = weight_dtype(config.dtype, model_config, on_gpu=device.platform != "cpu")
        loading = pool.submit(_load, source, model_config, dtype, mesh, config)
        planned = _compiled(model_config, config, mesh, (reading, loading))
        words, shape, runner = reading.result(), planned.shape, Runner(planned.programs, loading.result())
    if not config.enforce_eager:
        _warm_up(runner)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=shape.max_model_len,
            block_size=config.block_size,
            num_blocks=shape.num_blocks,
            scheduling_policy=config.scheduling_policy,
            batching=config.batching,
            enable_prefix_caching=config.enable_prefix_caching,
            decode_steps=planned.programs.catalogue.config.decode_steps,
        )
    )
    engine = Engine(
        scheduler,
        runner,
        words,
        eos_token_ids=_end_ids(words, defaults),
        vocab_size=model_config.vocab_size,
        max_logprobs=config.max_logprobs,
        seed=config.seed,
    )
    # What lives as long as the process: a collection that walks over it stops the loop for up to 0.1 s.
    gc.collect()
    gc.freeze()
    return Built(engine, source, whole, shape, defaults)


def _load(source: ModelSource, model: ModelConfig, dtype: Any, mesh: Mesh, config: EngineConfig) -> Params:
    start, shardings = time.perf_counter(), param_shardings(model, mesh)
    if config.load_format == "dummy":
        params = random_params(model, dtype, config.seed or 0, shardings)
    else:
        params = load_params(source, model, dtype, shardings)
    size, seconds = param_bytes(model, dtype) / 1e9, time.perf_counter() - start
    device = mesh.devices.flat[0]
    logger.info("%s on %s: %.2f GB of %s weights in %.1f s", source.name, device.device_kind, size, dtype, seconds)
    return params


def _compiled(
    model: ModelConfig,
    config: EngineConfig,
    mesh: Mesh,
    reading: Iterable[Future[Any]],
    temporary: int | None = None,
) -> Planned:
    """The programs, ready to run; with `enforce_eager` only those that may need the most memory.

    Room for temporaries is planned before anything compiles, and checked when XLA knows what the programs need.
    """
    planned = plan_programs(model, config, mesh, temporary)
    for future in reading:
        if future.done():
            future.result()  # raises at once what is wrong with the weights or the tokenizer
    programs, start = planned.programs, time.perf_counter()
    if not config.enforce_eager:
        programs.compile_all()
    elif planned.temporary is not None:
        programs.compile(largest_programs(programs.catalogue))
    log = programs.compile_log
    hits, seconds = sum(record.cache_hit for record in log), time.perf_counter() - start
    logger.info("compiled %d programs in %.1f s, %d of them from the cache", len(log), seconds, hits)
    if planned.temporary is not None and (needed := temporary_bytes(programs)) > planned.temporary:
        logger.warning(
            "programs need %.2f GB of temporary memory, more than the %.2f GB expected: compiling with fewer blocks",
            needed / 1e9,
            planned.temporary / 1e9,
        )
        return _compiled(model, config, mesh, reading, needed)
    return planned


def _warm_up(runner: Runner) -> None:
    start = time.perf_counter()
    runner.warm_up()
    logger.info("ran every step once in %.1f s", time.perf_counter() - start)


def _end_ids(tokenizer: Any | None, defaults: GenerationDefaults) -> frozenset[int]:
    own = tokenizer.eos_token_id if tokenizer is not None else None
    return frozenset(defaults.eos_token_ids) | ({own} if own is not None else set())


def _check_gpu_is_used() -> None:
    """Refuse to crawl along on the CPU beside an idle GPU, unless told to.

    Raises:
        DeviceError: naming what to install.
    """
    chosen = jax.config.jax_platforms or ""
    if jax.default_backend() == "cpu" and "cpu" not in chosen and Path("/proc/driver/nvidia/gpus").exists():
        raise DeviceError(
            "An NVIDIA GPU is present, but JAX has no plugin for it and would run on the CPU: install "
            "nanovllm-jax[cuda13] (driver 580 or newer) or nanovllm-jax[cuda12], or set JAX_PLATFORMS=cpu."
        )
