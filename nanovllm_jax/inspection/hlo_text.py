"""XLA's optimised HLO: lines with named scopes, equal layers folded, and the instructions that do the work."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from nanovllm_jax.inspection.jaxpr_text import Line
from nanovllm_jax.inspection.scopes import fold, layer_of, scope_of_op

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_NOISE = re.compile(r",? (?:metadata=\{[^{}]*\}|sharding=\{(?:[^{}]|\{[^{}]*\})*\}|backend_config=\{.*\})")
_SHAPE = re.compile(r"(pred|bf16|f16|f32|f64|[su]\d+|f8\w*)\[([\d,]*)\]")
_PARAMETER_LAYER = re.compile(r"layers\\?'\]\[(\d+)\]|caches\[(\d+)\]")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_LONGEST = 300


@dataclass(frozen=True)
class Instruction:
    """One instruction of the entry computation that runs on the device."""

    name: str
    opcode: str  # of a custom call its target
    scope: str
    result_bytes: int
    operand_bytes: int


def hlo_lines(text: str) -> tuple[list[Line], int]:
    """Lines with their scopes, and how many there were; of equal layers only the first is kept."""
    computations = _split(text)
    signatures: dict[int, Counter[str]] = {}
    tagged: list[tuple[str, str, int | None]] = []
    for lines in computations:
        layers = Counter(layer for line in lines if (layer := _layer(line)) is not None)
        whole = layers.most_common(1)[0][0] if len(layers) == 1 else None
        for line in lines:
            layer = whole if whole is not None else _layer(line)
            found = _OP_NAME.search(line)
            tagged.append((_clean(line), scope_of_op(found[1]) if found else "", layer))
            if layer is not None and (instruction := _INSTRUCTION.match(line)):
                kind = f"{instruction[3]} {_without_layout(instruction[2])}"
                signatures.setdefault(layer, Counter())[kind] += 1
    kept: dict[int, int] = {}  # first layer of its kind: how many there are
    for layer in sorted(signatures):
        like = next((first for first in kept if signatures[first] == signatures[layer]), layer)
        kept[like] = kept.get(like, 0) + 1
    note = ", ".join(f"layer{layer} ×{times}" for layer, times in kept.items())
    shown = [(line, fold(scope)) for line, scope, layer in tagged if layer is None or layer in kept]
    return ([(f"// equal layers are shown once: {note}", "")] if kept else []) + shown, len(tagged)


def instructions(text: str) -> list[Instruction]:
    """What the entry computation runs, with the bytes of its operands and results; of a loop, one turn of its body.

    A fusion that reads a few rows of a large operand counts it whole.
    """
    computations = {_computation_name(lines[0]): lines for lines in _split(text)}
    entry = next((lines for lines in computations.values() if lines[0].startswith("ENTRY")), [])
    return _run(entry, computations)


def _computation_name(header: str) -> str:
    return header.removeprefix("ENTRY ").lstrip("%").partition(" ")[0]


def _run(computation: list[str], computations: dict[str, list[str]]) -> list[Instruction]:
    sizes: dict[str, int] = {}
    found: list[Instruction] = []
    for line in computation:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, shape, opcode, rest = match.groups()
        sizes[name] = shape_bytes(shape)
        if opcode == "while" and (body := re.search(r"body=%?([\w.\-]+)", rest)):
            found += _run(computations.get(body[1], []), computations)
        if opcode in _FREE:
            continue
        operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
        target = re.search(r'custom_call_target="([^"]*)"', rest)
        op_name = _OP_NAME.search(line)
        found.append(
            Instruction(
                name,
                target[1] if target else opcode,
                scope_of_op(op_name[1]) if op_name else "",
                sizes[name],
                sum(sizes.get(operand, 0) for operand in operands),
            )
        )
    return found


def module_name(text: str) -> str:
    """The module's name, which a profile gives to what it runs."""
    return text.partition("\n")[0].removeprefix("HloModule ").partition(",")[0]


def instruction_scopes(text: str) -> dict[str, str]:
    """The scope of every instruction of every computation, by the instruction's name; "" of what XLA added."""
    found = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            op_name = _OP_NAME.search(line)
            found[match[1]] = scope_of_op(op_name[1]) if op_name else ""
    return found


def aliased_parameters(text: str) -> set[int]:
    """Parameters whose buffer a result takes over, from the module's header."""
    header = text.partition("\n")[0]
    found = re.search(r"input_output_alias=\{(.*?) \}", header)
    return {int(number) for number in re.findall(r"\((\d+), \{", found[1])} if found else set()


def shape_bytes(shape: str) -> int:
    """Bytes of a shape as HLO spells it, tuples included."""
    total = 0
    for dtype, dims in _SHAPE.findall(shape):
        size = _BYTES.get(dtype) or max(1, int(re.sub(r"\D", "", dtype)[:2] or 8) // 8)
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size
    return total


def _split(text: str) -> list[list[str]]:
    """The module's computations, each as its lines."""
    computations: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            computations.append([])
        if line.strip() and line[0] in "% E}":
            computations[-1].append(line)
    return [lines for lines in computations if lines]


def _layer(line: str) -> int | None:
    found = _OP_NAME.search(line)
    if not found:
        return None
    if parameter := _PARAMETER_LAYER.search(found[1]):
        return int(parameter[1] or parameter[2])
    return layer_of(scope_of_op(found[1]))


def _without_layout(shape: str) -> str:
    return re.sub(r"\{[^}]*\}", "", shape)


def _clean(line: str) -> str:
    line = _NOISE.sub("", line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
