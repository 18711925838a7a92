import json
import os
import subprocess
import sys

import pytest
from checkpoint_files import LLAMA, write_gguf

from nanovllm_jax.errors import ConfigError
from nanovllm_jax.models.families import model_config_from_hf
from nanovllm_jax.weights import load_tokenizer, locate

# Bytes spelled as in GPT-2: Ġ is the space, Ċ the line feed.
BYTE_LEVEL = ["<|end|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "he", "Ġhe", "12", "Ã", "©"]
MERGES = ["h e", "Ġ he", "1 2"]


def write(path, tokenizer, tokens, types, **strings):
    config = model_config_from_hf(LLAMA)
    metadata = {
        "tokenizer.ggml.model": ("add_string", tokenizer),
        "tokenizer.ggml.tokens": ("add_array", tokens),
        "tokenizer.ggml.token_type": ("add_array", types),
    }
    for key, value in strings.items():
        add = {str: "add_string", int: "add_uint32", bool: "add_bool", list: "add_array"}[type(value)]
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        metadata[name] = (add, value)
    return str(write_gguf(path, config, {}, metadata=metadata))


def byte_level(path, pre, **strings):
    types = [3, *[1] * (len(BYTE_LEVEL) - 1)]
    return write(path, "gpt2", BYTE_LEVEL, types, pre=pre, merges=MERGES, **strings)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["Ġhe", "1", "2"]),
        ("gpt-2", ["Ġhe", "12"]),
        ("qwen2", ["Ġhe", "1", "2"]),
        ("llama-bpe", ["Ġhe", "12"]),
        ("tekken", ["Ġhe", "1", "2"]),
    ],
)
def test_text_is_split_as_the_files_pre_tokenizer_says(tmp_path, pre, pieces):
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", pre))
    ids = tokenizer(" he12").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids) == " he12"


def test_special_tokens_and_template_are_those_of_the_file(tmp_path):
    path = byte_level(tmp_path / "m.gguf", "smollm", eos_token_id=0, chat_template="{{ messages }}")
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end|>", 0)
    assert tokenizer.chat_template == "{{ messages }}"
    ids = tokenizer("he<|end|>he").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", "<|end|>", "he"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hehe"


def test_a_start_token_is_added_where_the_file_says_so(tmp_path):
    path = byte_level(tmp_path / "m.gguf", "smollm", bos_token_id=0, add_bos_token=True)
    tokenizer = load_tokenizer(path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("he").input_ids) == ["<|end|>", "he"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("he", add_special_tokens=False).input_ids) == ["he"]


def test_sentencepiece_merges_follow_from_the_scores(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "ab", "▁ab", "ba"]
    scores = [0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -3.0, -1.0]
    types = [2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1]
    special = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", "llama", tokens, types, scores=scores, **special))
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab").input_ids) == ["<s>", "▁ab"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("abab é").input_ids) == [
        *("<s>", "▁", "a", "ba", "b", "▁", "<0xC3>", "<0xA9>")
    ]
    assert tokenizer.decode(tokenizer("abab é").input_ids, skip_special_tokens=True) == "abab é"


def test_an_unknown_tokenizer_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.pre = 'strange'.*Pass tokenizer="):
        load_tokenizer(byte_level(tmp_path / "pre.gguf", "strange"))
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.model = 'rwkv'.*Pass tokenizer="):
        load_tokenizer(write(tmp_path / "model.gguf", "rwkv", ["a"], [1]))
    config = model_config_from_hf(LLAMA)
    with pytest.raises(ConfigError, match=r"has no tokenizer\.ggml\.model"):
        load_tokenizer(str(write_gguf(tmp_path / "none.gguf", config, {})))


def test_a_directorys_tokenizer_survives_saving(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", "smollm", eos_token_id=0, chat_template="x"))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again(" he12 he").input_ids == tokenizer(" he12 he").input_ids
    assert (again.eos_token_id, again.chat_template) == (0, "x")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ConfigError, match=r"cannot be loaded.*pass tokenizer="):
        load_tokenizer(str(tmp_path))


def test_smollm2_tokenizes_as_the_original_does():
    tokenizer = load_tokenizer(locate("smollm2"))
    assert (tokenizer.eos_token_id, tokenizer.eos_token) == (2, "<|im_end|>")
    assert tokenizer("The capital of France is").input_ids == [504, 3575, 282, 4649, 314]
    text = "It isn't  12,345 été\n\n日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    digits = tokenizer.convert_ids_to_tokens(tokenizer("12345").input_ids)
    assert digits == ["1", "2", "3", "4", "5"]
    assert "<|im_start|>" in tokenizer.chat_template


def test_pytorch_is_not_imported_for_a_tokenizer_even_where_it_is_installed(tmp_path):
    # What transformers takes for an installed PyTorch; importing it takes seconds, here it fails.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not for a tokenizer')")
    info = tmp_path / "torch-2.11.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    (info / "top_level.txt").write_text("torch")
    (info / "RECORD").write_text("torch/__init__.py,,\n")
    code = "from nanovllm_jax.weights import load_tokenizer, locate; print(load_tokenizer(locate(None)).decode([65]))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout
