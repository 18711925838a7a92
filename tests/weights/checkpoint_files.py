"""Makes small checkpoints of random numbers, and says what the params pytree made of them must hold."""

import json

import gguf
import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file

from nanovllm_jax.models.params import abstract_params, map_specs

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 104,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "eos_token_id": 2,
}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}


def hf_tensors(config, seed=0):
    """Random tensors of a ModelConfig under Hugging Face's names and in its layout."""
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    sizes = {"q": config.num_heads * D, "k": config.num_kv_heads * D, "v": config.num_kv_heads * D}
    shapes = {"model.embed_tokens.weight": (config.vocab_size, E), "model.norm.weight": (E,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, E)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{name}_layernorm.weight": (E,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (size, E) for x, size in sizes.items()}
        shapes[f"{layer}self_attn.o_proj.weight"] = (E, sizes["q"])
        shapes |= {f"{layer}mlp.{name}_proj.weight": (F, E) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (E, F)
        if config.qkv_bias:
            shapes |= {f"{layer}self_attn.{x}_proj.bias": (size,) for x, size in sizes.items()}
        if config.o_bias:
            shapes[f"{layer}self_attn.o_proj.bias"] = (E,)
        if config.mlp_bias:
            shapes |= {f"{layer}mlp.{name}_proj.bias": (F,) for name in ("gate", "up")}
            shapes[f"{layer}mlp.down_proj.bias"] = (E,)
        if config.qk_norm:
            shapes |= {f"{layer}self_attn.{x}_norm.weight": (D,) for x in ("q", "k")}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def expected_params(config, tensors):
    """The same numbers in the layout of the params pytree, written out index by index."""
    E, F = config.hidden_size, config.intermediate_size
    K, G, D = config.num_kv_heads, config.group_size, config.head_dim

    def heads(layer, kind):
        q, k, v = (tensors[f"{layer}self_attn.{x}_proj.{kind}"] for x in "qkv")
        joined = np.zeros((*q.shape[1:], K, G + 2, D), np.float32)
        for head in range(K * G):
            joined[..., head // G, head % G, :] = q[head * D : (head + 1) * D].T
        for head in range(K):
            joined[..., head, G, :] = k[head * D : (head + 1) * D].T
            joined[..., head, G + 1, :] = v[head * D : (head + 1) * D].T
        return joined

    layers = []
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        mlp = {name: tensors[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
        leaves = {
            "input_norm": tensors[f"{layer}input_layernorm.weight"],
            "qkv": heads(layer, "weight"),
            "o": tensors[f"{layer}self_attn.o_proj.weight"].T.reshape(K, G, D, E),
            "post_norm": tensors[f"{layer}post_attention_layernorm.weight"],
            "gate_up": np.stack([mlp["gate"].T, mlp["up"].T], axis=1).reshape(E, 2, F),
            "down": mlp["down"].T,
        }
        if config.qkv_bias:
            leaves["qkv_bias"] = heads(layer, "bias")
        if config.o_bias:
            leaves["o_bias"] = tensors[f"{layer}self_attn.o_proj.bias"]
        if config.mlp_bias:
            leaves["gate_up_bias"] = np.stack([tensors[f"{layer}mlp.{x}_proj.bias"] for x in ("gate", "up")])
            leaves["down_bias"] = tensors[f"{layer}mlp.down_proj.bias"]
        if config.qk_norm:
            leaves |= {f"{x}_norm": tensors[f"{layer}self_attn.{x}_norm.weight"] for x in "qk"}
        layers.append(leaves)
    params = {
        "embed": tensors["model.embed_tokens.weight"],
        "layers": layers,
        "final_norm": tensors["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = tensors["lm_head.weight"]
    return params


def write_hf(directory, raw, tensors, shards=1):
    """A Hugging Face directory; with several shards also its index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    names = list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def write_gguf(path, config, tensors, quantisation=gguf.GGMLQuantizationType.F32, metadata=None, extra=None):
    """A GGUF file as llama.cpp's converter makes it: Llama's queries and keys interleaved."""
    writer = gguf.GGUFWriter(path, config.family)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    for key, (add, value) in (metadata or {}).items():
        getattr(writer, add)(key, value)
    for name, tensor in (tensors | (extra or {})).items():
        if config.family == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            halves = tensor.reshape(-1, 2, config.head_dim // 2, *tensor.shape[1:])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        stored = name if name in (extra or {}) else gguf_name(name)
        if tensor.ndim > 1 and quantisation != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(stored, gguf.quants.quantize(tensor, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(stored, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def on_first_device(config):
    """Shardings that put every leaf on one device."""
    sharding = SingleDeviceSharding(jax.devices()[0])
    return map_specs(lambda _: sharding, abstract_params(config))


def assert_same(params, expected, **tolerance):
    """Equal structure and numbers."""
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for (path, leaf), want in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(leaf, np.float32), want, err_msg=name, **(tolerance or {"rtol": 0}))
