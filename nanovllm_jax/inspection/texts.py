"""The texts of a program: jaxpr, StableHLO, optimised HLO, and the Triton IR and PTX of its kernels."""

from __future__ import annotations

import re
from typing import Any

from nanovllm_jax.inspection.hlo_text import hlo_lines
from nanovllm_jax.inspection.jaxpr_text import Line, jaxpr_lines
from nanovllm_jax.inspection.report import Text
from nanovllm_jax.inspection.stablehlo_text import stablehlo_lines
from nanovllm_jax.inspection.triton_calls import triton_kernels

_PLACE = re.compile(r" loc\([^()]*(?:\([^()]*\))?[^()]*\)$")  # of Triton's source


def texts_of(traced: Any, module: str, hlo: str | None, with_triton: Any | None) -> tuple[dict[str, Text], list[str]]:
    """Every text of a program, and the scopes that their lines name by index."""
    numbers: dict[str, int] = {"": 0}

    def text(found: tuple[list[Line], int]) -> Text:
        lines, full = found
        return Text([line for line, _ in lines], [numbers.setdefault(s, len(numbers)) for _, s in lines], full)

    texts = {"jaxpr": text(jaxpr_lines(traced.jaxpr.jaxpr)), "stablehlo": text(stablehlo_lines(module))}
    if hlo:
        texts["hlo"] = text(hlo_lines(hlo))
    if with_triton is not None:
        kernels = triton_kernels(with_triton)
        for name in ("ttir", "ptx"):
            lines: list[Line] = []
            for kernel in kernels:
                head = f"// {kernel.name}: {kernel.num_warps} warps, {kernel.shared_bytes} bytes of shared memory"
                body = [_PLACE.sub("", line) for line in getattr(kernel, name).splitlines() if line[:4] != "#loc"]
                lines += [(head, ""), *((line, "") for line in body)]
            texts["triton" if name == "ttir" else "ptx"] = text((lines, len(lines)))
    return texts, list(numbers)
