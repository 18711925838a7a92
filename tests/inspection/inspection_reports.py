"""Reports of small and of real shapes, for the tests beside this file."""

import dataclasses

from nanovllm_jax.config import EngineConfig, ModelConfig, RopeConfig
from nanovllm_jax.inspection import collect
from nanovllm_jax.inspection.gpus import find_gpu
from nanovllm_jax.inspection.plan import bucket_keys, choose_keys, plan_catalogue


def shape(hidden, mlp, layers, heads, kv_heads, head_dim, vocab, *, tied=False, family="qwen3"):
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        tie_word_embeddings=tied,
        qk_norm=family == "qwen3",
    )


SHAPES = {
    "tiny": shape(64, 128, 3, 4, 2, 16, 512, tied=True),
    "five layers": shape(64, 128, 5, 4, 2, 16, 512, tied=True),  # XLA compiles the first and the last in its own way
    "deep": shape(64, 128, 28, 4, 2, 16, 512, tied=True),
    "qwen3-0.6b": shape(1024, 3072, 28, 16, 8, 128, 151_936, tied=True),
    "qwen3-8b": shape(4096, 12_288, 36, 32, 8, 128, 151_936),
    "llama-3.1-8b": shape(4096, 14_336, 32, 32, 8, 128, 128_256, family="llama"),
}


def inspected(
    name,
    *,
    gpu="h200",
    keys=None,
    programs=None,
    context=1024,
    wrap=lambda catalogue: catalogue,
    buckets=False,
    **engine,
):
    config = EngineConfig(**{"max_num_seqs": 16, "max_num_batched_tokens": 1024, **engine})
    catalogue = wrap(plan_catalogue(SHAPES[name], config, find_gpu(gpu) if gpu else None))
    keys = keys or choose_keys(catalogue, None, None, None)
    made = programs(catalogue) if programs else None
    target = find_gpu(gpu) if gpu else None
    table = bucket_keys(catalogue, keys) if buckets else []
    return collect(catalogue, keys, model=name, programs=made, gpu=target, context=context, buckets=table)


def replaced(catalogue, **changes):
    """The catalogue with every program changed, to break it on purpose."""
    describe = catalogue.describe
    catalogue.describe = lambda key: dataclasses.replace(describe(key), **changes)
    return catalogue
