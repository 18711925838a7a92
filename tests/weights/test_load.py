import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import (
    LLAMA,
    QWEN2,
    QWEN3,
    assert_same,
    expected_params,
    hf_tensors,
    on_first_device,
    write_hf,
)

from nanovllm_jax.errors import WeightsError
from nanovllm_jax.models.families import model_config_from_hf
from nanovllm_jax.models.params import abstract_params, map_specs
from nanovllm_jax.parallel.mesh import make_mesh, param_shardings
from nanovllm_jax.weights import load_model_config, load_params, locate


def load(directory, dtype="float32"):
    source = locate(str(directory))
    config = load_model_config(source)
    return config, load_params(source, config, dtype, on_first_device(config))


@pytest.fixture(scope="module")
def llama():
    return model_config_from_hf(LLAMA)


@pytest.mark.parametrize(
    "raw",
    [
        LLAMA,
        LLAMA | {"attention_bias": True, "mlp_bias": True},
        LLAMA | {"tie_word_embeddings": True},
        QWEN2,
        QWEN3,
        QWEN3 | {"attention_bias": True},
    ],
    ids=["llama", "llama-biases", "llama-tied", "qwen2", "qwen3", "qwen3-biases"],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_lands_at_its_place(tmp_path, raw, shards):
    config = model_config_from_hf(raw)
    tensors = hf_tensors(config)
    loaded_config, params = load(write_hf(tmp_path, raw, tensors, shards))
    assert loaded_config == config
    assert_same(params, expected_params(config, tensors))
    shapes = map_specs(lambda spec: spec.shape, abstract_params(config))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_stored_dtypes_are_cast(tmp_path, llama, stored):
    tensors = {name: tensor.astype(stored) for name, tensor in hf_tensors(llama).items()}
    _, params = load(write_hf(tmp_path, LLAMA, tensors), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    plain = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    assert_same(params, expected_params(llama, plain), rtol=2**-7, atol=1e-6)


def test_shardings_of_a_mesh_are_kept(tmp_path, llama):
    write_hf(tmp_path, LLAMA, hf_tensors(llama))
    shardings = param_shardings(llama, make_mesh(1, 1))
    params = load_params(locate(str(tmp_path)), llama, "float32", shardings)
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, want: leaf.sharding == want, params, shardings)))


def test_leaves_split_over_eight_devices_hold_the_same_numbers(tmp_path, load_on_eight_devices):
    raw = LLAMA | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8}
    load_on_eight_devices(write_hf(tmp_path / "model", raw, hf_tensors(model_config_from_hf(raw))))


def test_missing_left_over_and_misshaped_tensors_are_named_together(tmp_path, llama):
    tensors = hf_tensors(llama)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.extra.weight"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(7, np.float32)
    write_hf(tmp_path, LLAMA, tensors)
    with pytest.raises(WeightsError) as error:
        load(tmp_path)
    for part in (
        "1 tensors missing: model.layers.1.mlp.up_proj.weight",
        "1 tensors left over: model.layers.0.extra.weight",
        "model.norm.weight is [7], not [96]",
    ):
        assert part in str(error.value)


def test_rotary_buffers_are_ignored(tmp_path, llama):
    tensors = hf_tensors(llama) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(16, np.float32)}
    load(write_hf(tmp_path, LLAMA, tensors))


def test_a_tied_head_may_be_stored_if_it_equals_the_embedding(tmp_path):
    raw = LLAMA | {"tie_word_embeddings": True}
    tensors = hf_tensors(model_config_from_hf(raw))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    _, params = load(write_hf(tmp_path / "equal", raw, tensors))
    assert "lm_head" not in params
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(WeightsError, match=r"left over: lm_head\.weight"):
        load(write_hf(tmp_path / "differs", raw, tensors))


@pytest.mark.parametrize("cut", [-4, 100, 3, 0], ids=["data", "header", "length", "empty"])
def test_a_truncated_safetensors_file_is_named_with_the_remedy(tmp_path, llama, cut):
    file = write_hf(tmp_path, LLAMA, hf_tensors(llama)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read.*copy it again"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path, llama):
    directory = write_hf(tmp_path, LLAMA, hf_tensors(llama), shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"1 of 3 weight files are missing.*model-00002-of-00003"):
        load(directory)


def test_a_corrupt_index_or_config_is_named(tmp_path, llama):
    directory = write_hf(tmp_path, LLAMA, hf_tensors(llama), shards=2)
    (directory / "model.safetensors.index.json").write_text("{")
    with pytest.raises(WeightsError, match=r"index\.json is corrupt"):
        load(directory)
    (directory / "config.json").write_text(json.dumps(LLAMA)[:-9])
    with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
        load(directory)


def test_quantised_and_absent_safetensors_are_refused(tmp_path, llama):
    tensors = hf_tensors(llama)
    name = "model.layers.0.mlp.up_proj.weight"
    write_hf(tmp_path, LLAMA, tensors | {name: tensors[name].astype(np.int8)})
    with pytest.raises(WeightsError, match=f"{name} is I8.*supported are"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="has no safetensors files"):
        load(tmp_path)
