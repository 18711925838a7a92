"""nanovllm-jax, as its README uses it."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

PACKAGES = ["nanovllm-jax", "jax", "jaxlib", "jax-triton", "triton"]


class Engine:
    """`LLM(model, **options)`."""

    def __init__(self, model: str, options: dict) -> None:
        from nanovllm_jax import LLM
        from nanovllm_jax.cli.terminal import set_up_logging

        set_up_logging(verbose=True)
        for handler in logging.getLogger().handlers:  # milliseconds since about the start of the process
            handler.setFormatter(logging.Formatter("%(relativeCreated)7d %(levelname)s %(message)s"))
        self.llm = LLM(model, **options)

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> tuple[list[int], int]:
        """Lengths of the outputs, and prompt tokens found in the prefix cache."""
        from nanovllm_jax import SamplingParams

        params = [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length, detokenize=False)
            for length in output_lens
        ]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        return lengths, sum(output.num_cached_tokens or 0 for output in outputs)

    def trace(self, folder: str) -> AbstractContextManager:
        """Writes a profiler trace of what runs inside."""
        import jax

        return jax.profiler.trace(folder)

    def device(self) -> str:
        """Kind of the first device."""
        import jax

        return jax.devices()[0].device_kind

    def close(self) -> None:
        """Gives the device back."""
        self.llm.close()
