"""TMA copies of Mosaic kernels that L2 gives up before anything else.

Weights, keys and values pass through L2 once a step, or a few times at once, and are many times what it holds. Without
a hint they push out what is read again and what waits to be written: Qwen3-8B's layer of 64 rows takes 4 us longer
(H200). The hint is `createpolicy.fractional.L2::evict_first` of all lines, in the encoding of CUTLASS's
`TMA::CacheHintSm90`.

Pallas (jax 0.11.2) has no parameter for it, so copies get it where Mosaic makes them, in kernels of a marked name. A
version of jax that makes its copies elsewhere makes them without.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

_EVICT_FIRST = 0x12F0000000000000
_MARK = "_l2_evict_first"
_MOSAICS_SUFFIX = "_mosaic_gpu"  # of the function that a kernel becomes
_lock = threading.Lock()


def stream_copies(kernel: Callable[..., None]) -> Callable[..., None]:
    """The body of a Mosaic kernel, marked: L2 gives up first what its copies of tiles read."""
    with _lock:
        _hint_marked()
    kernel.__name__ += _MARK
    return kernel


@functools.cache
def _hint_marked() -> None:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, nvvm

    copy = getattr(nvvm, "cp_async_bulk_tensor_shared_cluster_global", None)
    if copy is None:
        return

    @functools.wraps(copy)
    def hinted_copy(*args: Any, **options: Any) -> Any:
        function: Any = ir.InsertionPoint.current.block.owner
        while function is not None and function.operation.name != "func.func":
            function = function.operation.parent
        name = "" if function is None else ir.StringAttr(function.operation.attributes["sym_name"]).value
        if name.endswith(_MARK + _MOSAICS_SUFFIX) and options.get("l2_cache_hint") is None:
            i64 = ir.IntegerType.get_signless(64)
            options["l2_cache_hint"] = arith.constant(i64, ir.IntegerAttr.get(i64, _EVICT_FIRST))
        return copy(*args, **options)

    nvvm.cp_async_bulk_tensor_shared_cluster_global = hinted_copy
