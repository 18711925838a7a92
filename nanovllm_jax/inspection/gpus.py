"""What the data sheets say of the GPUs that a program can be inspected for: the roof of the roofline."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm_jax.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU: bytes a second from device memory, and dense bfloat16 operations a second."""

    name: str
    compute_capability: int  # 90 for sm_90
    memory_bytes: float
    bytes_per_s: float
    flops_per_s: float

    def limit_s(self, flops: float, num_bytes: float) -> float:
        """The least time that the work can take: what is slower, arithmetic or memory."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


# Data sheets of NVIDIA: memory, its bandwidth, tensor cores in bfloat16 with float32 sums, without sparsity.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80, 80e9, 2.039e12, 312e12),
        Gpu("a100-40gb", 80, 40e9, 1.555e12, 312e12),
        Gpu("rtx3090", 86, 24e9, 0.936e12, 71e12),
        Gpu("rtx4090", 89, 24e9, 1.008e12, 165e12),
        Gpu("l40s", 89, 48e9, 0.864e12, 362e12),
        Gpu("h100", 90, 80e9, 3.35e12, 989e12),
        Gpu("h200", 90, 141e9, 4.8e12, 989e12),
        Gpu("b200", 100, 180e9, 8.0e12, 2250e12),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        ConfigError: naming those that are known.
    """
    if name not in GPUS:
        raise ConfigError(f"GPU {name!r} is not known; choose one of {', '.join(GPUS)}.")
    return GPUS[name]


def gpu_of_device(kind: str) -> Gpu | None:
    """The GPU behind a `jax.Device.device_kind` such as "NVIDIA H200", if it is known."""
    words = kind.lower().replace("geforce ", "").replace("rtx ", "rtx").replace("-", " ").split()
    if "a100" in words:
        return GPUS["a100-40gb" if "40gb" in words else "a100"]
    return next((GPUS[word] for word in words if word in GPUS), None)
