"""Loading a model over several devices keeps no second copy of it on the host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import jax.numpy as jnp
import pytest
from checkpoint_files import LLAMA, hf_tensors, write_gguf, write_hf
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from nanovllm_jax.models.families import model_config_from_hf
from nanovllm_jax.models.params import random_params
from nanovllm_jax.parallel.mesh import make_mesh, param_shardings
from nanovllm_jax.weights import save_orbax
from nanovllm_jax.weights.generation import GenerationDefaults

SCRIPT = Path(__file__).with_name("host_memory.py")
# 105 MB in bfloat16, of which no array has more than 4 MB.
LARGE = LLAMA | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 2048,
    "torch_dtype": "bfloat16",
}
SMALL = LARGE | {"num_hidden_layers": 1}
# 4.3 GB: Orbax reads arrays side by side, up to a gigabyte of them.
LARGEST = LARGE | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32}

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory is in use")


def write_safetensors(directory, config, raw):
    return write_hf(directory, raw, hf_tensors(config), shards=3)


def write_quantised(path, config, _):
    return write_gguf(path, config, hf_tensors(config), gguf.GGMLQuantizationType.Q8_0)


def write_orbax(directory, config, _):
    params = random_params(config, jnp.bfloat16, 0, param_shardings(config, make_mesh(1, 1)))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0}, [])), eos_token="a")
    save_orbax(params, config, tokenizer, GenerationDefaults(), directory)
    return directory


@pytest.mark.parametrize(
    ("write", "ending", "large"),
    [
        pytest.param(write_safetensors, "", LARGE, id="safetensors"),
        pytest.param(write_quantised, ".gguf", LARGE, id="gguf"),
        pytest.param(write_orbax, "", LARGEST, id="orbax", marks=pytest.mark.slow),
    ],
)
def test_a_model_split_over_two_devices_is_never_on_the_host_twice(tmp_path, write, ending, large):
    models = [
        str(write(tmp_path / f"{name}{ending}", model_config_from_hf(raw), raw))
        for name, raw in (("small", SMALL), ("large", large))
    ]
    command = [sys.executable, str(SCRIPT), *models]
    run = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    used = json.loads(run.stdout)
    assert used["split"] > 0.9 * used["params"]  # or every device would hold all of it
    # The devices' parameters are host memory here: with a copy of all of them it would be two, or three in float32.
    assert 0.5 < used["peak"] / used["params"] < 1.5
