"""Named scopes, spelled alike in a jaxpr, in StableHLO, in XLA's HLO and in a profile.

`jit(decode_forward)/layer3/jit(_layer)/attention/rope_paged_decode/triton_kernel_call` is the scope
`layer3/attention/rope_paged_decode`; folded over the layers it is `layer*/attention/rope_paged_decode`.
"""

from __future__ import annotations

import re

# What JAX puts into a name stack beside `jax.named_scope`.
_MACHINERY = re.compile(
    r"(jit|pjit|vmap|jvp|transpose|shard_map|shmap_body|while|body|cond|body_fun|cond_fun|scan|branch_\d+_fun|"
    r"closed_call|call_exported|eval_jaxpr|core_call|checkpoint|remat|custom_jvp_call|custom_vjp_call|run_state|jit:)(\(.*\))?"
)
_LAYER = re.compile(r"\blayer(\d+)\b")


def scope_of(name_stack: str) -> str:
    """The named scopes of a name stack, without the machinery of JAX's transformations."""
    parts = name_stack.replace("\\'", "'").split("/")
    return "/".join(part for part in parts if part and not _MACHINERY.fullmatch(part))


def scope_of_op(op_name: str) -> str:
    """The named scopes of an `op_name`, whose last part is the primitive."""
    return scope_of(op_name.rpartition("/")[0])


def fold(scope: str) -> str:
    """The scope with every layer's number replaced by `*`."""
    return _LAYER.sub("layer*", scope)


def layer_of(scope: str) -> int | None:
    """The layer's number, if the scope is inside one."""
    found = _LAYER.search(scope)
    return int(found[1]) if found else None
