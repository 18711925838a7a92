"""Loading a model over several devices keeps no second copy of it on the host.

Orbax reads its arrays side by side, up to a gigabyte of them: more than a test can load to tell that from all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from checkpoint_files import LLAMA, hf_tensors, write_gguf, write_hf

from nanovllm_jax.models.families import model_config_from_hf

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

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory is in use")


def write_safetensors(directory, config, raw):
    return write_hf(directory, raw, hf_tensors(config), shards=3)


def write_quantised(path, config, _):
    return write_gguf(path, config, hf_tensors(config), gguf.GGMLQuantizationType.Q8_0)


@pytest.mark.parametrize(
    ("write", "ending"), [(write_safetensors, ""), (write_quantised, ".gguf")], ids=["safetensors", "gguf"]
)
def test_a_model_split_over_two_devices_is_never_on_the_host_twice(tmp_path, write, ending):
    models = [
        str(write(tmp_path / f"{name}{ending}", model_config_from_hf(raw), raw))
        for name, raw in (("small", SMALL), ("large", LARGE))
    ]
    command = [sys.executable, str(SCRIPT), *models]
    run = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    used = json.loads(run.stdout)
    assert used["split"] > 0.9 * used["params"]  # or every device would hold all of it
    # The devices' parameters are host memory here: with a copy of all of them it would be two, or three in float32.
    assert 0.5 < used["peak"] / used["params"] < 1.5
