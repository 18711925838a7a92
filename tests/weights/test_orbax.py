import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import LLAMA, assert_same, expected_params, hf_tensors, on_first_device, write_hf
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from nanovllm_jax.errors import ConfigError, WeightsError
from nanovllm_jax.models.families import model_config_from_hf
from nanovllm_jax.parallel.mesh import make_mesh, param_shardings, split_heads
from nanovllm_jax.weights import (
    convert,
    load_generation_defaults,
    load_model_config,
    load_params,
    load_tokenizer,
    locate,
)

RAW = LLAMA | {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
}


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hf"), RAW)


def write_model(directory, raw):
    """A Hugging Face directory with a tokenizer."""
    write_hf(directory, raw, hf_tensors(model_config_from_hf(raw)))
    tokenizer = Tokenizer(BPE({"<end>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", chat_template="{{ messages }}"
    ).save_pretrained(directory)
    stated = {"eos_token_id": [0, 3], "temperature": 0.6, "top_k": 20, "max_new_tokens": 99}
    (directory / "generation_config.json").write_text(json.dumps(stated))
    return directory


@pytest.fixture(scope="module")
def converted(hf_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "model"
    convert(str(hf_model), directory)
    return directory


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "copy")


def load(directory, dtype="float32"):
    source = locate(str(directory))
    config = load_model_config(source)
    return load_params(source, config, dtype, on_first_device(config))


def test_the_converted_directory_is_the_whole_model(hf_model, converted):
    before, after = locate(str(hf_model)), locate(str(converted))
    assert (before.kind, after.kind) == ("safetensors", "orbax")
    config = load_model_config(before)
    assert load_model_config(after) == config
    assert load_generation_defaults(after) == load_generation_defaults(before)
    assert load_tokenizer(after)("abab").input_ids == [3, 3]
    assert load_tokenizer(after).chat_template == "{{ messages }}"
    assert_same(load(converted), expected_params(config, hf_tensors(config)))


def test_arrays_are_cast_to_the_dtype_asked_for(converted):
    params = load(converted, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    config = model_config_from_hf(RAW)
    assert_same(params, expected_params(config, hf_tensors(config)), rtol=2**-8)


def test_leaves_restore_to_eight_devices(converted, load_on_eight_devices):
    load_on_eight_devices(converted)


@pytest.mark.parametrize(("kv_heads", "shards"), [(1, 8), (2, 8), (2, 4)])
def test_kv_heads_are_copied_where_there_are_more_shards(tmp_path, kv_heads, shards):
    raw = RAW | {"num_key_value_heads": kv_heads, "attention_bias": True}
    original, directory = write_model(tmp_path / "hf", raw), tmp_path / "orbax"
    convert(str(original), directory)
    config = split_heads(load_model_config(locate(str(directory))), shards)
    assert config.kv_head_copies == shards // kv_heads
    shardings = param_shardings(config, make_mesh(shards, 1))
    expected, found = (load_params(locate(str(path)), config, "float32", shardings) for path in (original, directory))

    def check(leaf, want, sharding):
        assert leaf.sharding == sharding
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(want))

    jax.tree.map(check, found, expected, shardings)


def test_a_directory_in_use_is_not_overwritten(hf_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        convert(str(hf_model), tmp_path)


def test_arrays_that_do_not_fit_the_config_are_named(copy):
    path = copy / "nanovllm_config.json"
    config = load_model_config(locate(str(copy)))
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(config, num_layers=3, vocab_size=8))))
    with pytest.raises(WeightsError) as error:
        load(copy)
    assert "['embed']" in str(error.value)
    assert "['layers'][2]" in str(error.value)


def failed_load(directory):
    """What a user reads when the command line loads it; Orbax's reads that still run when one fails end with it."""
    command = [
        sys.executable,
        "-c",
        "from nanovllm_jax.cli import main; main()",
        "generate",
        "--model",
        str(directory),
        "a",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return " ".join(done.stderr.split())


def test_corrupt_arrays_are_named(copy):
    for file in (copy / "params" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert re.search(r"cannot be restored.*convert the model again", failed_load(copy))


def test_missing_arrays_and_a_wrong_config_are_named(copy):
    shutil.rmtree(copy / "params")
    with pytest.raises(WeightsError, match=r"cannot be restored.*convert the model again"):
        load(copy)
    (copy / "nanovllm_config.json").write_text('{"family": "llama", "rope": {"bend": 3}}')
    with pytest.raises(WeightsError, match="of another version"):
        load(copy)
