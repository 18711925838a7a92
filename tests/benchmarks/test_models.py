import json

import numpy as np
from models import MODELS, QWEN3_0_6B, config_of, prepare_model, qwen3_shapes, random_tensor
from safetensors.numpy import load_file

from nanovllm_jax import LLM, SamplingParams

SMALL = QWEN3_0_6B | {
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "bos_token_id": 0,
    "eos_token_id": 256,
    "max_position_embeddings": 128,
}


def test_random_checkpoint_is_what_its_seed_says_and_loads_with_its_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)
    directory = prepare_model("small", tmp_path / "model", weights=True)
    tensors = load_file(directory / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == dict(qwen3_shapes(SMALL))
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        np.testing.assert_array_equal(tensors[name], random_tensor(name, tensors[name].shape, 0))
    with LLM(str(directory), max_num_seqs=2, max_num_batched_tokens=32, enforce_eager=True) as llm:
        assert llm.get_tokenizer().decode(llm.get_tokenizer().encode("été")) == "été"
        params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.6)
        assert len(llm.generate("abc", params, use_tqdm=False)[0].outputs[0].token_ids) == 3


def test_weights_that_are_there_are_kept_until_the_shape_changes(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)
    file = prepare_model("small", tmp_path, weights=True) / "model.safetensors"
    written = file.stat().st_mtime_ns
    prepare_model("small", tmp_path, weights=True)
    assert file.stat().st_mtime_ns == written
    monkeypatch.setitem(MODELS, "small", SMALL | {"num_hidden_layers": 1})
    prepare_model("small", tmp_path, weights=True)
    assert load_file(file).keys() == dict(qwen3_shapes(MODELS["small"])).keys()


def test_config_alone_for_engines_that_make_weights(tmp_path):
    prepare_model("qwen3-8b", tmp_path, weights=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == config_of(str(tmp_path)) == config_of("qwen3-8b")
    assert config_of("someone/model") is None
