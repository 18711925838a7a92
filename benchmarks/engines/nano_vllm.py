"""nano-vLLM with CUDA graphs, as in its own `bench.py`."""

from __future__ import annotations

PACKAGES = ["nano-vllm", "torch", "triton", "transformers", "flash-attn"]


class Engine:
    """`LLM(model, **options)` of nano-vLLM."""

    def __init__(self, model: str, options: dict) -> None:
        from nanovllm import LLM

        self.llm = LLM(model, **{"enforce_eager": False} | options)

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> tuple[list[int], None]:
        """Lengths of the outputs; hits of the prefix cache are not reported. It always decodes text."""
        from nanovllm import SamplingParams

        params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length) for length in output_lens]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [len(output["token_ids"]) for output in outputs], None

    def device(self) -> str:
        """Name of the first GPU."""
        import torch

        return torch.cuda.get_device_name(0)

    def close(self) -> None:
        """Nothing: it has registered its own clean-up for the end of the process."""
