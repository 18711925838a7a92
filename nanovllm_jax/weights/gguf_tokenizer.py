"""The tokenizer inside a GGUF file, built with the `tokenizers` library.

`transformers` can read it too (`AutoTokenizer.from_pretrained(..., gguf_file=...)`), but only with PyTorch
installed, and without the digit splitting of SmolLM's pre-tokenizer. The pre-tokenizers are those that
llama.cpp names in `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nanovllm_jax.errors import ConfigError
from nanovllm_jax.weights.gguf_file import GGUFFile

# `tokenizer.ggml.token_type`
_CONTROL, _USER_DEFINED = 3, 4

_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r")
_GPT2 = ("gpt-2", "gpt2")


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerBase:
    """Tokenizer and chat template of a GGUF file; its special ids are those that the file states.

    Raises:
        ConfigError: if the file has no tokenizer, or one of a kind that is not supported.
    """
    get = _Metadata(file)
    kind = get("model")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(get)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(get), True
    else:
        raise get.unsupported("model", ["gpt2", "llama"])
    tokens: list[str] = get("tokens")
    types: list[int] = get("token_type", [])
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, type_ in zip(tokens, types, strict=False)
            if type_ == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    special_tokens = {
        name: tokens[index]
        for name, key in _SPECIAL_TOKENS.items()
        if (index := get(f"{key}_token_id", None)) is not None
    }
    before = special_tokens.get("bos_token") if get("add_bos_token", adds_bos) else None
    after = special_tokens.get("eos_token") if get("add_eos_token", False) else None
    _add_post_processor(tokenizer, before, after)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )


class _Metadata:
    """The keys under `tokenizer.ggml.`; without a default a key must be there."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def __call__(self, key: str, *default: Any) -> Any:
        value = self._file.metadata.get(f"tokenizer.ggml.{key}", *default)
        if value is None and not default:
            raise ConfigError(
                f"{self._file.path} has no tokenizer.ggml.{key}; pass tokenizer= with the directory or hub "
                "id of the model's tokenizer."
            )
        return value

    def unsupported(self, key: str, supported: list[str]) -> ConfigError:
        return ConfigError(
            f"{self._file.path} has tokenizer.ggml.{key} = {self(key, None)!r}; supported are "
            f"{', '.join(supported)}. Pass tokenizer= with the directory or hub id of the model's tokenizer."
        )


def _byte_level(get: _Metadata) -> tuple[Tokenizer, bool]:
    """BPE over bytes spelled as printable characters; also whether a start token is added by default."""
    pre = get("pre", None)
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    elif pre in _DIGITS_APART:
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    elif pre in _GPT2:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        raise get.unsupported("pre", [*_SPLITS, *_DIGITS_APART, *_GPT2])
    vocabulary = {token: index for index, token in enumerate(get("tokens"))}
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=_SPLITS.get(pre) is _LLAMA3))
    if _SPLITS.get(pre) is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, _SPLITS.get(pre) is _LLAMA3


def _sentencepiece(get: _Metadata) -> Tokenizer:
    """BPE of Llama 2 and Mistral: merges follow from the scores, unknown characters are spelled in bytes."""
    tokens: list[str] = get("tokens")
    scores: list[float] = get("scores")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token, _ in sorted(zip(tokens, scores, strict=True), key=lambda item: -item[1])
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = tokens[get("unknown_token_id", 0)]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if get("add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _add_post_processor(tokenizer: Tokenizer, before: str | None, after: str | None) -> None:
    """Put the start token before and the end token after a prompt."""
    special = {token: tokenizer.token_to_id(token) for token in (before, after) if token is not None}
    if special:
        single = [before, "$A", after] if before and after else [before, "$A"] if before else ["$A", after]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, "$B:1"], special_tokens=list(special.items())
        )
