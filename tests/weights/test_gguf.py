import gguf
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
    write_gguf,
)

from nanovllm_jax.errors import ConfigError, WeightsError
from nanovllm_jax.models.families import model_config_from_hf
from nanovllm_jax.models.rope import rope_frequencies
from nanovllm_jax.weights import load_generation_defaults, load_model_config, load_params, locate

Q = gguf.GGMLQuantizationType


def load(path, dtype="float32"):
    source = locate(str(path))
    config = load_model_config(source)
    return config, load_params(source, config, dtype, on_first_device(config))


@pytest.fixture(scope="module")
def llama():
    return model_config_from_hf(LLAMA)


@pytest.mark.parametrize(
    "raw",
    [LLAMA, LLAMA | {"attention_bias": True}, LLAMA | {"tie_word_embeddings": True}, QWEN2, QWEN3],
    ids=["llama", "llama-biases", "llama-tied", "qwen2", "qwen3"],
)
def test_config_and_every_tensor_are_those_of_the_model(tmp_path, raw):
    config = model_config_from_hf(raw)
    tensors = hf_tensors(config)
    loaded, params = load(write_gguf(tmp_path / "model.gguf", config, tensors))
    assert loaded.rms_norm_eps == pytest.approx(config.rms_norm_eps)
    assert {**vars(loaded), "rms_norm_eps": 0} == {**vars(config), "rms_norm_eps": 0}
    assert_same(params, expected_params(config, tensors))


@pytest.mark.parametrize(
    ("quantisation", "tolerance"),
    [(Q.F16, 2e-3), (Q.BF16, 2e-2), (Q.Q8_0, 2e-2), (Q.Q4_0, 0.4), (Q.Q4_1, 0.4)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_quantised_blocks_are_dequantised(tmp_path, llama, quantisation, tolerance):
    tensors = hf_tensors(llama)
    _, params = load(write_gguf(tmp_path / "model.gguf", llama, tensors, quantisation))
    assert_same(params, expected_params(llama, tensors), atol=tolerance)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_type": "llama3", "original_max_position_embeddings": 8192}


def rope_factors(config, rope_scaling):
    """The table that llama.cpp's converter writes."""
    rope = model_config_from_hf(LLAMA | {"rope_scaling": rope_scaling}).rope
    plain, _ = rope_frequencies(config.head_dim, config.rope)
    stretched, _ = rope_frequencies(config.head_dim, rope)
    return {"rope_freqs.weight": (plain / stretched).astype(np.float32)}


def test_llama3_rope_is_recognised_in_its_table_of_factors(tmp_path, llama):
    path = write_gguf(tmp_path / "m.gguf", llama, hf_tensors(llama), extra=rope_factors(llama, LLAMA3))
    config, _ = load(path)
    assert config.rope == model_config_from_hf(LLAMA | {"rope_scaling": LLAMA3}).rope


def test_another_table_of_rope_factors_is_refused(tmp_path, llama):
    other = rope_factors(llama, LLAMA3 | {"high_freq_factor": 6.0})
    path = write_gguf(tmp_path / "m.gguf", llama, hf_tensors(llama), extra=other)
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight"):
        load(path)


def test_linear_and_yarn_scaling_are_read_from_the_metadata(tmp_path, llama):
    def rope(kind):
        scaling = {
            "llama.rope.scaling.type": ("add_string", kind),
            "llama.rope.scaling.factor": ("add_float32", 4.0),
            "llama.rope.scaling.original_context_length": ("add_uint32", 64),
        }
        path = write_gguf(tmp_path / f"{kind}.gguf", llama, hf_tensors(llama), metadata=scaling)
        config = load_model_config(locate(str(path)))
        return config.rope.type, config.rope.factor, config.rope.original_max_position_embeddings

    assert rope("linear") == ("linear", 4.0, None)
    assert rope("yarn") == ("yarn", 4.0, 64)
    with pytest.raises(ConfigError, match="longrope"):
        rope("longrope")


def test_unsupported_architecture_and_keys_are_named(tmp_path, llama):
    key = {"llama.attention.clamp_kqv": ("add_float32", 8.0)}
    path = write_gguf(tmp_path / "key.gguf", llama, hf_tensors(llama), metadata=key)
    with pytest.raises(ConfigError, match=r"llama\.attention\.clamp_kqv = 8"):
        load_model_config(locate(str(path)))
    experts = {"llama.expert_count": ("add_uint32", 8)}
    path = write_gguf(tmp_path / "experts.gguf", llama, {}, metadata=experts)
    with pytest.raises(ConfigError, match=r"llama\.expert_count = 8"):
        load_model_config(locate(str(path)))
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"architecture 'mamba'; supported are llama, qwen2, qwen3"):
        load_model_config(locate(str(tmp_path / "other.gguf")))


@pytest.mark.parametrize("keep", [0, 3, 40, 900, -4], ids=["empty", "magic", "metadata", "infos", "data"])
def test_a_truncated_file_is_named_with_the_remedy(tmp_path, llama, keep):
    path = write_gguf(tmp_path / "model.gguf", llama, hf_tensors(llama))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"model\.gguf.*truncated.*copy it again"):
        load(path)


def test_a_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(WeightsError, match="does not start with 'GGUF'"):
        load(path)


def test_missing_and_left_over_tensors_are_named(tmp_path, llama):
    tensors = hf_tensors(llama)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    path = write_gguf(tmp_path / "m.gguf", llama, tensors, extra={"blk.0.strange.weight": np.ones(3, np.float32)})
    with pytest.raises(WeightsError) as error:
        load(path)
    assert "missing: model.layers.1.mlp.down_proj.weight" in str(error.value)
    assert "left over: blk.0.strange.weight" in str(error.value)


def test_smollm2_loads_from_its_wheel():
    source = locate("smollm2")
    config, params = load(source.path, "bfloat16")
    assert (config.family, config.num_layers, config.num_heads, config.num_kv_heads) == ("llama", 30, 9, 3)
    assert (config.vocab_size, config.tie_word_embeddings, config.rope.theta) == (49152, True, 100_000)
    assert params["layers"][29]["qkv"].shape == (576, 3, 5, 64)
    assert load_generation_defaults(source).eos_token_ids == (2,)
