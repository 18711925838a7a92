"""What a model is and how the engine runs it: frozen, validated where they are made."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal

from nanovllm_jax.errors import ConfigError

RopeType = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency and how it is stretched for long contexts.

    Field names follow Hugging Face's `rope_parameters`; fields that a `type` does not use keep their defaults.
    """

    theta: float = 10_000.0
    type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scales cos and sin; None means 0.1 * ln(factor) + 1
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a dense decoder-only transformer (Qwen3, Qwen2, Llama, Mistral).

    E `hidden_size`, F `intermediate_size`, L `num_layers`, H `num_heads`, K `num_kv_heads`, D `head_dim`,
    V `vocab_size`.

    Raises:
        ConfigError: if a size is not positive or H is not a multiple of K.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    kv_cache_scales: bool = False  # whether the checkpoint has scales for a float8 cache
    dtype: str = "bfloat16"  # what the checkpoint was saved in
    # With more shards than KV heads each KV head is held this many times; num_kv_heads counts the copies.
    kv_head_copies: int = 1

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "grouped-query attention needs a whole number of query heads for each KV head."
            )

    @property
    def group_size(self) -> int:
        """G, query heads for each KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs a model. `LLM` documents each field; names and defaults are vLLM's.

    Raises:
        ConfigError: if a value is out of range.
    """

    dtype: str = "auto"
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 16_384
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    compile_at_start: bool = True
    seed: int | None = 0
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    batching: Literal["prefill_first", "mixed"] = "prefill_first"
    attention_backend: Literal["auto", "xla", "triton"] = "auto"
    num_gpu_blocks_override: int | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    max_logprobs: int = 20
    decode_steps: int | None = None

    def __post_init__(self) -> None:
        _require_choice("dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        _require_choice("kv_cache_dtype", self.kv_cache_dtype, ("auto", "fp8", "bfloat16", "float16", "float32"))
        _require_choice("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        _require_choice("batching", self.batching, ("prefill_first", "mixed"))
        _require_choice("attention_backend", self.attention_backend, ("auto", "xla", "triton"))
        _require_choice("load_format", self.load_format, ("auto", "dummy"))
        for name in ("tensor_parallel_size", "data_parallel_size", "max_num_seqs", "max_num_batched_tokens"):
            self._make_whole(name, 1)
        # The shortest request is a token and one more.
        for name, least in (("max_model_len", 2), ("num_gpu_blocks_override", 1), ("decode_steps", 1)):
            if getattr(self, name) is not None:
                self._make_whole(name, least)
        self._make_whole("max_logprobs", 0)
        if self.seed is not None:
            self._make_whole("seed", 0)
        if self.block_size not in (8, 16, 32, 64, 128, 256):
            raise ConfigError(f"block_size is {self.block_size}; choose 8, 16, 32, 64, 128 or 256.")
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0.0 < share <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization is {share!r}; it is a share of the device's memory "
                "and must be above 0 and at most 1."
            )
        if self.decode_steps is not None and self.decode_steps > self.block_size:
            raise ConfigError(
                f"decode_steps is {self.decode_steps}; it must be at most block_size {self.block_size}, so that a row "
                "opens at most one block a step."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, below max_num_seqs "
                f"{self.max_num_seqs}; a decode step computes one token a sequence: raise the first or lower the "
                "second."
            )

    def _make_whole(self, name: str, least: int) -> None:
        """Store what behaves as an integer (NumPy's) as one."""
        value = getattr(self, name)
        try:
            number = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = None
        if number is None or number < least:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}.")
        object.__setattr__(self, name, number)

    @property
    def compiles_at_start(self) -> bool:
        """Whether every program is compiled before the first request."""
        return self.compile_at_start and not self.enforce_eager


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")
