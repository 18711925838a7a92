"""What a start imports: PyTorch takes ten seconds, and transformers one."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from nanovllm_jax.weights import load_tokenizer, locate

# It ends without Python's teardown, in which threads of XLA's CPU client have been seen to abort (on a busy machine).
START = """
import os, sys
from nanovllm_jax import LLM, SamplingParams

with LLM(max_num_seqs=1, max_model_len=64, enforce_eager=True, skip_tokenizer_init={skip}) as llm:
    if {skip}:
        llm.generate([{{"prompt_token_ids": [1, 2, 3]}}], SamplingParams(max_tokens=2))
    else:
        llm.chat([{{"role": "user", "content": "Who is there?"}}], SamplingParams(max_tokens=2))
print(sorted({{name.partition(".")[0] for name in sys.modules}}), flush=True)
os._exit(0)
"""


def imported_by_a_start(tmp_path, *, skip_tokenizer):
    """Top-level modules, with a package torch that looks installed and cannot be imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('torch is imported')")
    (tmp_path / "torch-2.9.0.dist-info").mkdir()
    (tmp_path / "torch-2.9.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    script = START.format(skip=skip_tokenizer)
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_start_imports_no_torch(tmp_path):
    modules = imported_by_a_start(tmp_path, skip_tokenizer=False)
    assert "'transformers'" in modules
    for name in ("torch", "flax", "orbax", "scipy", "pandas", "rich", "fastapi"):
        assert f"'{name}'" not in modules


def test_a_start_without_a_tokenizer_imports_no_transformers(tmp_path):
    modules = imported_by_a_start(tmp_path, skip_tokenizer=True)
    assert "'transformers'" not in modules
    assert "'tokenizers'" not in modules


@pytest.mark.parametrize("model_type", [None, "llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "LlamaTokenizer"])
def test_the_class_is_the_one_that_transformers_chooses(tmp_path, model_type, named):
    (tmp_path / "tokenizer.json").write_bytes((locate(None).path / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    found, expected = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert type(found) is type(expected)
    assert found("To be, or not 2 be").input_ids == expected("To be, or not 2 be").input_ids
