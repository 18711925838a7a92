"""Paged attention, KV cache and sampling kernels for JAX on NVIDIA GPUs, each with an XLA reference for any platform.

Every operation is one function that states its shape contract; `backend` picks the implementation: "xla"
anywhere, "triton" on NVIDIA GPUs from sm_80 up (imported only when asked for).
"""

from nanovllm_kernels._compat import lowering_for
from nanovllm_kernels.add_rms_norm import add_rms_norm
from nanovllm_kernels.add_shards import add_shards, add_shards_scaled
from nanovllm_kernels.decode_layers import decode_layers, decode_layers_supports
from nanovllm_kernels.gated_matmul import gated_matmul
from nanovllm_kernels.paged_decode import paged_decode
from nanovllm_kernels.ragged_prefill import ragged_prefill
from nanovllm_kernels.rope_cache_write import rope_cache_write
from nanovllm_kernels.rope_paged_decode import plan_rope_paged_decode, rope_paged_decode
from nanovllm_kernels.sample import sample
from nanovllm_kernels.sample_head import sample_head
from nanovllm_kernels.silu_mul import silu_mul
from nanovllm_kernels.skinny_matmul import Scaled, scaled, skinny_matmul, skinny_matmul_scaled, split_counters

__all__ = [
    "Scaled",
    "add_rms_norm",
    "add_shards",
    "add_shards_scaled",
    "decode_layers",
    "decode_layers_supports",
    "gated_matmul",
    "lowering_for",
    "paged_decode",
    "plan_rope_paged_decode",
    "ragged_prefill",
    "rope_cache_write",
    "rope_paged_decode",
    "sample",
    "sample_head",
    "scaled",
    "silu_mul",
    "skinny_matmul",
    "skinny_matmul_scaled",
    "split_counters",
]
