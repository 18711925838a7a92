"""Small schedulers for tests."""

from nanovllm_jax.engine.scheduler import Scheduler, SchedulerConfig

BLOCK = 4


def make_scheduler(**changes):
    limits = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "block_size": BLOCK,
        "num_blocks": 32,
    }
    return Scheduler(SchedulerConfig(**(limits | changes)))
