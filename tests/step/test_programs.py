"""Every program of the engine lowers for NVIDIA GPUs, on a machine that has none."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from nanovllm_jax.config import ModelConfig, RopeConfig
from nanovllm_jax.inspection.triton_calls import triton_kernels
from nanovllm_jax.models import projections
from nanovllm_jax.models.params import ParamSpec, abstract_params
from nanovllm_jax.parallel.mesh import MODEL_AXIS, make_mesh, param_shardings, replica_meshes
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.programs import Programs
from nanovllm_jax.step.state import StateShape
from nanovllm_jax.step.step import StepConfig
from nanovllm_kernels import lowering_for
from nanovllm_kernels._compat import import_jax_triton

QWEN3 = ModelConfig(
    family="qwen3",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=1e6),
    tie_word_embeddings=True,
    qk_norm=True,
)
STEPS = [ProgramKey("decode", 16), ProgramKey("decode_forward", 16), ProgramKey("prefill", 64)]


def catalogue(
    backend: str, shards: int = 1, replica: int = 0, model: ModelConfig = QWEN3, most_rows: int = 16
) -> Catalogue:
    mesh = replica_meshes(make_mesh(shards, replica + 1))[replica]
    params = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=sharding),
        abstract_params(model),
        param_shardings(model, mesh),
        is_leaf=lambda leaf: isinstance(leaf, ParamSpec),
    )
    shape = StateShape(num_blocks=512, block_size=16, max_num_seqs=most_rows, max_model_len=4096)
    return Catalogue(
        StepConfig(model, shape, backend, axis_name=MODEL_AXIS if shards > 1 else None, decode_steps=4),
        params,
        jnp.bfloat16,
        mesh,
        decode_sizes=[4, most_rows],
        filtered_sizes=[most_rows],
        sampling_sizes=[4, most_rows],
        prefill_sizes=[64, 256],
        num_logprobs=20,
    )


def lowered_for_cuda(key: ProgramKey, shards: int, replica: int = 0) -> str:
    with lowering_for(90):
        return lower(catalogue("triton", shards, replica), key)


@pytest.mark.parametrize("key", catalogue("triton").all_keys(), ids=str)
def test_every_program_lowers_for_cuda(key):
    runs_kernels = not key.kind.startswith("update")
    assert ("triton" in lowered_for_cuda(key, 1)) == runs_kernels


def test_layers_that_pass_on_what_follows_a_norm_are_one_function(monkeypatch):
    model = replace(QWEN3, num_layers=4)
    passed, product = [], projections.skinny_matmul_scaled

    def recorded(*args, **options):
        passed.append(args)
        return product(*args, **options)

    monkeypatch.setattr(projections, "skinny_matmul_scaled", recorded)
    with lowering_for(90):
        text = lower(catalogue("triton", model=model, most_rows=128), ProgramKey("decode", 128))
    assert len(passed) == 3  # twice in the layer, once to learn what it passes on
    assert set(re.findall(r"call @(_layer\w*)", text)) == {"_layer"}


def test_threads_that_need_the_same_kernel_compile_it_once(monkeypatch):
    function, compiled = import_jax_triton().triton_lib.TritonFunction, []
    compile_kernel = function._compile_kernel

    def recorded(self, specialization, *rest):
        compiled.append((self.name, repr(specialization)))
        return compile_kernel(self, specialization, *rest)

    monkeypatch.setattr(function, "_compile_kernel", recorded)
    traces = catalogue("triton"), catalogue("triton")
    with lowering_for(80), ThreadPoolExecutor(2) as pool:  # no other test here lowers for this GPU
        for one in [pool.submit(copy_context().run, lower, each, ProgramKey("decode_filtered", 16)) for each in traces]:
            one.result()
    assert len(compiled) == len(set(compiled)) > 3


def lower(programs: Catalogue, key: ProgramKey) -> str:
    return programs.trace(key).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_a_split_step_sums_twice_a_layer_and_once_for_the_embedding(shards):
    for key in STEPS:
        text = lowered_for_cuda(key, shards)
        assert "triton" in text
        # The layer is one function that is called for each: its two sums, and the embedding's. What follows attention
        # in a prefill's last layer is apart, for the last tokens alone.
        assert text.count("stablehlo.all_reduce") == (5 if key.kind == "prefill" else 3)
        # Where the step samples, each shard's best score and its id are merged.
        assert text.count("stablehlo.all_gather") == (2 if key.kind == "decode" else 0)
        assert not [name for name in ("all_to_all", "permute") if f"stablehlo.{name}" in text]


@pytest.mark.parametrize(("shards", "replicas"), [(1, 2), (1, 8), (2, 2), (2, 4), (4, 2)])
def test_the_last_replica_runs_the_program_of_the_first(shards, replicas):
    for key in STEPS:
        # No device is named in it, so one compilation serves all.
        assert lowered_for_cuda(key, shards, replicas - 1) == lowered_for_cuda(key, shards)


@pytest.mark.parametrize("key", STEPS, ids=str)
def test_the_cache_is_updated_in_place(key):
    memory = Programs(catalogue("xla"), command_buffers=True)[key].memory_analysis()
    cache_bytes = 2 * 2 * 512 * 16 * 8 * 128 * 2
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes


@pytest.mark.parametrize("kv_cache_scales", [False, True])
def test_one_rows_layers_are_one_kernel_also_with_scales_for_another_cache(kv_cache_scales):
    model = replace(QWEN3, hidden_size=1024, intermediate_size=3072, kv_cache_scales=kv_cache_scales)
    with lowering_for(90):
        lowered = catalogue("triton", model=model).trace(ProgramKey("decode", 1)).lower(lowering_platforms=("cuda",))
    assert "decode_layers_kernel" in {kernel.name for kernel in triton_kernels(lowered)}
