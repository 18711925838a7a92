import logging

import pytest

from nanovllm_jax.config import RopeConfig
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.models.families import model_config_from_hf

SIZES = {
    "vocab_size": 100,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"]}
QWEN2 = SIZES | {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
QWEN3 = SIZES | {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2}
MISTRAL = SIZES | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}


def test_llama_defaults_are_those_of_the_family():
    config = model_config_from_hf(LLAMA)
    assert (config.family, config.num_kv_heads, config.head_dim) == ("llama", 6, 16)
    assert config.rope == RopeConfig(theta=10_000.0)
    assert config.rms_norm_eps == 1e-6
    flags = (config.tie_word_embeddings, config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm)
    assert not any(flags)
    biased = model_config_from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert biased.qkv_bias
    assert biased.o_bias
    assert biased.mlp_bias


def test_qwen2_has_biases_on_query_key_and_value_only():
    config = model_config_from_hf(QWEN2)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (True, False, False, False)


def test_qwen3_normalises_heads_of_128():
    config = model_config_from_hf(QWEN3)
    assert (config.qk_norm, config.head_dim, config.qkv_bias, config.o_bias) == (True, 128, False, False)
    biased = model_config_from_hf(QWEN3 | {"attention_bias": True, "head_dim": 64})
    assert (biased.head_dim, biased.qkv_bias, biased.o_bias) == (64, True, True)


def test_null_kv_heads_means_as_many_as_query_heads():
    assert model_config_from_hf(QWEN3 | {"num_key_value_heads": None}).num_kv_heads == 6


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_saved_dtype_is_read_in_both_spellings(key):
    assert model_config_from_hf(LLAMA | {key: "float16"}).dtype == "float16"
    with pytest.raises(ConfigError, match="float8"):
        model_config_from_hf(LLAMA | {key: "float8_e4m3fn"})


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 2}, RopeConfig(theta=5e5, type="linear", factor=2.0)),
        (
            {"rope_type": "llama3", "original_max_position_embeddings": 128, **LLAMA3},
            RopeConfig(theta=5e5, type="llama3", original_max_position_embeddings=128, **LLAMA3),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16},
            RopeConfig(theta=5e5, type="yarn", factor=4.0, original_max_position_embeddings=512, beta_fast=16.0),
        ),
        ({"rope_type": "default"}, RopeConfig(theta=5e5)),
        (None, RopeConfig(theta=5e5)),
    ],
    ids=["linear", "llama3", "yarn", "default", "null"],
)
def test_rope_is_read_in_the_old_and_the_new_spelling(scaling, expected):
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling}
    new = LLAMA | {"rope_parameters": {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}}
    assert model_config_from_hf(old).rope == expected
    assert model_config_from_hf(new).rope == expected


def test_yarn_lengthens_the_context_and_fills_in_what_is_not_stated():
    config = model_config_from_hf(LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert config.rope.original_max_position_embeddings == 512
    assert config.max_position_embeddings == 2048
    after = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert model_config_from_hf(LLAMA | {"rope_scaling": after}).max_position_embeddings == 512


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not supported; supported are default, linear"),
        ({"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]}, "short_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_type": "linear"}, "needs factor"),
    ],
    ids=["type", "field", "partial", "llama3", "linear"],
)
def test_rope_that_is_not_supported_is_refused_by_name(scaling, named):
    with pytest.raises(ConfigError, match=named):
        model_config_from_hf(LLAMA | {"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("hidden_act", "gelu"),
        ("hidden_act", ""),
        ("is_causal", False),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "awq"}),
        ("final_logit_softcapping", 30.0),
        ("rope_interleaved", True),
        ("num_experts", 8),
        ("something_new", "yes"),
    ],
)
def test_attributes_that_change_the_result_are_refused_by_name(attribute, value):
    with pytest.raises(ConfigError, match=attribute):
        model_config_from_hf(LLAMA | {attribute: value})


def test_harmless_and_neutral_attributes_are_accepted():
    extra = {"hidden_act": "silu", "use_cache": True, "bos_token_id": 1, "initializer_range": 0.02}
    extra |= {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}}
    extra |= {"quantization_config": None, "_name_or_path": "x", "pretraining_tp": 2, "model_type": "llama"}
    assert model_config_from_hf(LLAMA | extra) == model_config_from_hf(LLAMA)


def test_an_unsupported_architecture_is_refused_with_the_supported_ones():
    with pytest.raises(ConfigError, match="MambaForCausalLM is not supported; supported are LlamaForCausalLM"):
        model_config_from_hf(SIZES | {"architectures": ["MambaForCausalLM"]})
    with pytest.raises(ConfigError, match="model_type None"):
        model_config_from_hf(SIZES)


@pytest.mark.parametrize("value", [None, "12", 1.5, True])
def test_a_size_that_is_missing_or_no_whole_number_is_named(value):
    with pytest.raises(ConfigError, match="hidden_size"):
        model_config_from_hf(LLAMA | {"hidden_size": value})


def test_mistral_windows_all_layers_alike():
    assert model_config_from_hf(MISTRAL | {"sliding_window": 128}).sliding_window == 128
    assert model_config_from_hf(MISTRAL | {"sliding_window": None}).sliding_window is None
    # 4,096 by default: no effect within 512 tokens.
    assert model_config_from_hf(MISTRAL).sliding_window is None
    long = MISTRAL | {"max_position_embeddings": 32_768}
    assert model_config_from_hf(long).sliding_window == 4096


@pytest.mark.parametrize("raw", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_qwens_window_counts_only_if_it_is_used(raw):
    raw = raw | {"sliding_window": 128, "max_window_layers": 0}
    assert model_config_from_hf(raw).sliding_window is None
    assert model_config_from_hf(raw | {"use_sliding_window": True}).sliding_window == 128
    unused = {"use_sliding_window": True, "max_window_layers": 4}
    assert model_config_from_hf(raw | unused).sliding_window is None


@pytest.mark.parametrize(
    "layers",
    [{"max_window_layers": 3}, {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}],
    ids=["max_window_layers", "layer_types"],
)
def test_a_window_in_some_layers_caps_the_length_with_a_warning(caplog, layers):
    raw = QWEN3 | {"use_sliding_window": True, "sliding_window": 128} | layers
    with caplog.at_level(logging.WARNING, logger="nanovllm_jax"):
        config = model_config_from_hf(raw)
    assert (config.sliding_window, config.max_position_embeddings) == (None, 128)
    assert "1 of 4 layers" in caplog.text
    assert "capped at 128 instead of 512 tokens" in caplog.text
