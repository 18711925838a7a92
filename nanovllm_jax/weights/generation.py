"""What a checkpoint says about generating: end ids and sampling defaults."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanovllm_jax.errors import WeightsError
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.weights.gguf_file import GGUFFile
from nanovllm_jax.weights.source import ModelSource


@dataclass(frozen=True)
class GenerationDefaults:
    """Defaults for requests that do not say otherwise; None where the model does not say.

    As in vLLM, `do_sample` is ignored: greedy decoding is asked for with a temperature of 0.
    """

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def sampling_params(self) -> SamplingParams:
        """The model's recommendation; what it does not state has vLLM's default."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
        return SamplingParams(**{name: value for name in names if (value := getattr(self, name)) is not None})


def load_generation_defaults(source: ModelSource) -> GenerationDefaults:
    """Read `generation_config.json`, the end ids of `config.json` without one, or a GGUF file's metadata.

    Raises:
        WeightsError: if a file is corrupt.
    """
    if source.kind == "gguf":
        metadata = GGUFFile(source.path).metadata
        ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        return GenerationDefaults(eos_token_ids=_ids(ids))
    stated = read_json(source.path / "generation_config.json", {})
    eos = stated.get("eos_token_id")
    if eos is None:
        eos = read_json(source.path / "config.json", {}).get("eos_token_id")
    numbers = {name: _number(stated, name, float) for name in ("temperature", "top_p", "min_p")}
    return GenerationDefaults(
        eos_token_ids=_ids(eos if isinstance(eos, list) else [eos]),
        top_k=_number(stated, "top_k", int),
        repetition_penalty=_number(stated, "repetition_penalty", float),
        max_tokens=_number(stated, "max_new_tokens", int),
        **numbers,
    )


def generation_config(defaults: GenerationDefaults) -> dict[str, Any]:
    """The content of a `generation_config.json` that reads back as `defaults`."""
    stated = {name: value for name, value in asdict(defaults).items() if value is not None}
    stated["eos_token_id"] = list(stated.pop("eos_token_ids"))
    if "max_tokens" in stated:
        stated["max_new_tokens"] = stated.pop("max_tokens")
    return stated


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file; `default` if there is no file.

    Raises:
        WeightsError: if the file is no JSON object, or is missing and there is no default.
    """
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); download or copy it again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no JSON object; download or copy it again.")
    return content


def _ids(values: list[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(value) for value in values if value is not None))


def _number(stated: dict[str, Any], name: str, kind: type) -> Any:
    value = stated.get(name)
    return None if value is None else kind(value)
