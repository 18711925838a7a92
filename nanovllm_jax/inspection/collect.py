"""Makes a `Report` from a catalogue of programs, compiled or only lowered for a GPU that is not there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jax

from nanovllm_jax.inspection import findings as look
from nanovllm_jax.inspection.buckets import bucket_rows, memory_of, program_name
from nanovllm_jax.inspection.card import make_card
from nanovllm_jax.inspection.compilations import ARGUMENT_NAMES, explain_compilations
from nanovllm_jax.inspection.costs import Counted, count, kernel_of, kernel_rows
from nanovllm_jax.inspection.gpus import Gpu, gpu_of_device
from nanovllm_jax.inspection.hlo_text import Instruction, aliased_parameters, instructions
from nanovllm_jax.inspection.kernel_costs import load_of
from nanovllm_jax.inspection.measured import with_measured
from nanovllm_jax.inspection.report import (
    Argument,
    Compilation,
    Finding,
    KernelRow,
    MemoryPlan,
    Profile,
    Program,
    Report,
)
from nanovllm_jax.inspection.scopes import fold
from nanovllm_jax.inspection.texts import texts_of
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.programs import Programs
from nanovllm_jax.step.state import device_bytes
from nanovllm_kernels import lowering_for

DEFAULT_CONTEXT = 1024
_MAKERS = ("triton", "mosaic", "cublas", "cudnn", "nccl", "fusion")


def collect(
    catalogue: Catalogue,
    keys: Sequence[ProgramKey],
    *,
    model: str,
    programs: Programs | None = None,
    gpu: Gpu | None = None,
    context: int = DEFAULT_CONTEXT,
    compilations: Sequence[Compilation] | None = None,
    buckets: Sequence[ProgramKey] = (),
    profile: Profile | None = None,
) -> Report:
    """Look into programs.

    Args:
        catalogue: describes them.
        keys: which ones.
        model: its name.
        programs: compiles them for the device at hand and keeps them; None only lowers.
        gpu: the GPU to lower for, which need not be there; None for the device at hand.
        context: tokens that each sequence has, for the costs of attention.
        compilations: the compile log; None takes that of `programs`.
        buckets: programs for the bucket table.
        profile: whose measured times go beside the limits.
    """
    device = catalogue.mesh.devices.flat[0]
    peaks = gpu or (gpu_of_device(device.device_kind) if device.platform != "cpu" else None)
    look_into = _Collector(catalogue, programs if gpu is None else None, gpu, peaks, context, profile)
    found = [look_into.program(key) for key in keys]
    if compilations is None:
        compilations = explain_compilations([programs]) if programs else []
    with lowering_for(gpu.compute_capability) if gpu else nullcontext():
        table = bucket_rows(
            catalogue,
            buckets,
            programs.compiled() if programs else {},
            peaks=peaks,
            context=context,
            compilations=compilations,
            profile=profile,
            inspected=found,
        )
    on_gpu = gpu is not None or device.platform != "cpu"
    temporaries = [program.memory.temporaries for program in found if program.memory]
    stats = None if gpu else device.memory_stats()
    total = int(gpu.memory_bytes) if gpu else (stats or {}).get("bytes_limit")
    memory = MemoryPlan(
        weights=device_bytes(catalogue.params),
        cache=device_bytes(catalogue.caches),
        rows=device_bytes(catalogue.rows),
        extras=device_bytes(catalogue.extras),
        temporaries=max(temporaries) if temporaries else None,
        total=total,
    )
    target = f"{gpu.name} (sm_{gpu.compute_capability}), lowered without one" if gpu else device.device_kind
    card = make_card(catalogue, model, target, peaks, context, on_gpu)
    return Report(card, found, memory, look_into.findings, list(compilations), table, profile)


class _Collector:
    def __init__(
        self,
        catalogue: Catalogue,
        programs: Programs | None,
        gpu: Gpu | None,
        peaks: Gpu | None,
        context: int,
        profile: Profile | None,
    ) -> None:
        self._catalogue, self._programs, self._gpu, self._peaks = catalogue, programs, gpu, peaks
        self._context, self._profile = context, profile
        self._on_gpu = gpu is not None or catalogue.mesh.devices.flat[0].platform != "cpu"
        self._shards = catalogue.mesh.devices.size if catalogue.config.axis_name else 1
        self.findings: list[Finding] = []

    def program(self, key: ProgramKey) -> Program:
        name = program_name(key)
        started = time.perf_counter()
        with lowering_for(self._gpu.compute_capability) if self._gpu else nullcontext():
            traced = self._catalogue.trace(key)
            trace_s = time.perf_counter() - started
            platforms = ("cuda",) if self._gpu else None
            lowered = traced.lower(lowering_platforms=platforms)
        lower_s = time.perf_counter() - started - trace_s
        started = time.perf_counter()
        compiled = self._programs[key] if self._programs else None
        compile_s = time.perf_counter() - started if compiled else None
        hlo = compiled.as_text() if compiled else None
        module = lowered.as_text(debug_info=True)

        counted = count(traced.jaxpr.jaxpr)
        load = load_of(key.kind, key.size, self._context)
        rows = with_measured(kernel_rows(counted, self._catalogue, load, self._peaks), self._profile, name)
        arguments = _arguments(key, self._catalogue, lowered, module, hlo)
        ran = instructions(hlo) if hlo else []
        self._note(name, traced, arguments, counted, ran)
        flops, flops_source = _flops(lowered, rows, counted)
        texts, scopes = texts_of(traced, module, hlo, lowered if "triton" in counted.native.values() else None)
        return Program(
            name=name,
            kind=key.kind,
            size=key.size,
            scopes=scopes,
            arguments=arguments,
            flops=flops,
            flops_source=flops_source,
            bytes=sum(row.bytes or 0 for row in rows),
            bytes_source="shapes of products, formulas of kernels; the rest counts as fused",
            limit_s=self._peaks.limit_s(flops, sum(row.bytes or 0 for row in rows)) if self._peaks else None,
            kernels=rows,
            instructions=_instruction_rows(ran),
            collectives=dict(counted.collectives),
            memory=memory_of(compiled),
            needs=None if compiled else "a GPU" if self._gpu else "compiling",
            texts=texts,
            trace_s=trace_s,
            lower_s=lower_s,
            compile_s=compile_s,
        )

    def _note(
        self, name: str, traced: Any, arguments: list[Argument], counted: Counted, ran: list[Instruction]
    ) -> None:
        config, dtype = self._catalogue.config, self._catalogue.params["embed"].dtype
        self.findings += look.donation_findings(name, arguments)
        self.findings += look.traced_findings(name, traced.jaxpr.jaxpr, dtype)
        self.findings += look.compiled_findings(name, ran)
        self.findings += look.kernel_findings(
            name,
            counted,
            config.backend,
            on_gpu=self._on_gpu,
            shards=self._shards,
            layers=config.model.num_layers,
        )


def _flops(lowered: Any, rows: list[KernelRow], counted: Counted) -> tuple[float, str]:
    """XLA's count where it sees everything but custom calls; ours where there are loops, which it counts once."""
    kernels = sum(row.flops or 0 for row in rows if row.source == "formula")
    loops = {kernel for kernel, _ in counted.kernels} - {kernel_of(scope) for scope, _ in counted.native}
    analysis = lowered.cost_analysis()
    if loops or counted.loops or not analysis or "flops" not in analysis:
        return sum(row.flops or 0 for row in rows), "shapes of products, formulas of kernels"
    return float(analysis["flops"]) + kernels, "XLA, and formulas of custom calls" if kernels else "XLA"


def _arguments(key: ProgramKey, catalogue: Catalogue, lowered: Any, module: str, hlo: str | None) -> list[Argument]:
    """One entry an argument; of a program that is not compiled, what its lowering promises."""
    parameters = aliased_parameters(hlo) if hlo else _promised(module)
    # Arguments that nothing reads are no parameters, such as the buffers to which a split model has the addresses.
    kept = sorted(lowered._lowering.compile_args["kept_var_idx"])  # no public function tells
    reused = {kept[number] for number in parameters}
    found, start = [], 0
    for name, tree, info in zip(
        ARGUMENT_NAMES[key.kind], catalogue.describe(key).arguments, lowered.args_info[0], strict=True
    ):
        leaves, donated = jax.tree.leaves(tree), [leaf.donated for leaf in jax.tree.leaves(info)]
        held = sum(1 for number in range(start, start + len(leaves)) if number in reused)
        dtypes = sorted({str(leaf.dtype) for leaf in leaves})
        found.append(Argument(name, len(leaves), device_bytes(tree), dtypes, all(donated), held))
        start += len(leaves)
    return found


def _promised(module: str) -> set[int]:
    """Parameters of @main that are marked to be taken over by a result."""
    main = next(line for line in module.splitlines() if "func.func public @main(" in line)
    parts = main.partition(") -> ")[0].split("%arg")[1:]
    return {index for index, part in enumerate(parts) if "tf.aliasing_output" in part or "jax.buffer_donor" in part}


def _instruction_rows(ran: list[Instruction]) -> list[KernelRow]:
    """Instructions of equal kind and scope as one row, the largest first."""
    groups: dict[tuple[str, str], list[int]] = {}
    for one in ran:
        groups.setdefault((one.opcode, fold(one.scope)), []).append(one.result_bytes + one.operand_bytes)
    rows = [
        KernelRow(opcode, _maker(opcode), scope, len(sizes), None, sum(sizes), "XLA", None, None)
        for (opcode, scope), sizes in groups.items()
    ]
    return sorted(rows, key=lambda row: -(row.bytes or 0))


def _maker(opcode: str) -> str:
    """Whose kernel an instruction or a custom call runs."""
    return next((name for name in _MAKERS if name in opcode.lower()), "xla instruction")
