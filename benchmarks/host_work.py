"""What the host does for each token of each row: the real engine over devices that are only a clock.

    python benchmarks/host_work.py                                   # devices that need no time: all is the host's
    python benchmarks/host_work.py --data-parallel-size 8 --step-ms 24 --launch-ms 1.4

Scheduler, block manager, packing, reading and outputs are the engine's own; its programs return at once. With
`--step-ms` a decode step is ready that long after the one before it (a prefill of 16,384 tokens after twice that), and
`--launch-ms` is how long the runtime keeps the calling thread for each program without needing Python.
Needs no GPU; the times are this machine's and say nothing of a device.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanovllm_jax.cli.bench import print_table, random_requests
from nanovllm_jax.config import EngineConfig, ModelConfig, RopeConfig
from nanovllm_jax.engine.engine import Engine
from nanovllm_jax.engine.plan import abstract_weights, describe_programs, smallest_shape
from nanovllm_jax.engine.schedule import SchedulerConfig
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.parallel.mesh import make_mesh
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_jax.step.runner import Runner
from nanovllm_jax.step.state import StateShape

ROWS, MAX_MODEL_LEN, DECODE_STEPS = 256, 2048, 4
# Its size changes nothing on the host.
MODEL = ModelConfig(
    family="qwen3", vocab_size=151_936, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
    head_dim=8, max_position_embeddings=MAX_MODEL_LEN, rms_norm_eps=1e-6, rope=RopeConfig(),
)  # fmt: skip
_sleep_without_python = ctypes.CDLL(None).usleep  # ctypes lets other threads run meanwhile
