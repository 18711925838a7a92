"""vLLM at its defaults, prefix caching and CUDA graphs included; its cache and rows as large as the cases ask."""

from __future__ import annotations

import importlib.util
import os

PACKAGES = ["vllm", "torch", "triton", "transformers", "flashinfer-python"]


class Engine:
    """`LLM(model, **options)` of vLLM."""

    def __init__(self, model: str, options: dict) -> None:
        if importlib.util.find_spec("flashinfer") is None:
            os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        from vllm import LLM

        self.llm = LLM(model, **{"dtype": "bfloat16", "max_num_seqs": 512, "seed": 0} | options)

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> tuple[list[int], int | None]:
        """Lengths of the outputs, and prompt tokens found in the prefix cache."""
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length, detokenize=False)
            for length in output_lens
        ]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        cached = [output.num_cached_tokens for output in outputs]
        return [len(output.outputs[0].token_ids) for output in outputs], None if None in cached else sum(cached)

    def device(self) -> str:
        """Name of the first GPU."""
        import torch

        return torch.cuda.get_device_name(0)

    def close(self) -> None:
        """Nothing: its processes end when this one does."""
