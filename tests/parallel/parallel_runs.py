"""The same requests on any number of devices."""

from __future__ import annotations

from nanovllm_jax import LLM, SamplingParams

_PREFIX = list(range(20, 60))
PROMPTS = [[1, 2, 3], [7] * 33, [*_PREFIX, 70, 71], [7] * 40, *([*_PREFIX, 80 + i, 81] for i in range(4))]
_SAMPLING = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 30, "seed": 4},
    {"temperature": 0.8, "seed": 5, "repetition_penalty": 1.3, "logit_bias": {300: 2}},
]
PARAMS = [SamplingParams(max_tokens=20, ignore_eos=True, **_SAMPLING[i % 4]) for i in range(len(PROMPTS))]
TIGHT = {"num_gpu_blocks_override": 7, "max_num_batched_tokens": 17}  # chunks and preemption
UNCACHED = {"enable_prefix_caching": False}


def open_llm(path, shards, replicas, **settings):
    arguments = {"max_num_batched_tokens": 64, "skip_tokenizer_init": True, "dtype": "float32"} | settings
    return LLM(
        None if path is None else str(path),
        max_model_len=128,
        max_num_seqs=4,
        enforce_eager=True,
        tensor_parallel_size=shards,
        data_parallel_size=replicas,
        **arguments,
    )


def generate(path, shards=1, replicas=1, **settings):
    """Token ids of each prompt's output, all prompts once for each replica; how often a request was preempted."""
    with open_llm(path, shards, replicas, **settings) as llm:
        outputs = llm.generate(PROMPTS * replicas, PARAMS * replicas, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs], sum(o.metrics.num_preemptions for o in outputs)
