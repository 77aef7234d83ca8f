"""parallax_gen: specialised, tuned Triton kernels for Parallax attention.

    from parallax_gen import parallax_attn_func, parallax_attn_varlen_func, parallax_attn_with_kvcache
    from parallax_gen.nn import ParallaxAttention

Importing it touches no GPU, disk or database, and imports neither torch nor triton: names load when first used.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallax_gen import nn
    from parallax_gen.api.first_calls import tune_first_calls
    from parallax_gen.api.lock import lock
    from parallax_gen.api.prepare import prepare
    from parallax_gen.api.tune import tune
    from parallax_gen.problem.shapes import Shape
    from parallax_gen.problem.spec import KernelSpec
    from parallax_gen.runtime.functional import parallax_attn_func, parallax_attn_varlen_func
    from parallax_gen.runtime.graphed import GraphedDecode
    from parallax_gen.runtime.invariance import batch_invariant
    from parallax_gen.runtime.kvcache import kvcache_workspace_size, parallax_attn_with_kvcache
    from parallax_gen.runtime.locking import use_lock
    from parallax_gen.runtime.recording import record
    from parallax_gen.runtime.states import State, merge_states

__version__ = "0.1.0"

__all__ = [
    "GraphedDecode",
    "KernelSpec",
    "Shape",
    "State",
    "__version__",
    "batch_invariant",
    "kvcache_workspace_size",
    "lock",
    "merge_states",
    "nn",
    "parallax_attn_func",
    "parallax_attn_varlen_func",
    "parallax_attn_with_kvcache",
    "prepare",
    "record",
    "tune",
    "tune_first_calls",
    "use_lock",
]

logging.getLogger(__name__).addHandler(
    logging.NullHandler()
)  # to see which kernel runs, an application adds its own handler

_HOMES = {
    "parallax_attn_func": "parallax_gen.runtime.functional",
    "parallax_attn_varlen_func": "parallax_gen.runtime.functional",
    "parallax_attn_with_kvcache": "parallax_gen.runtime.kvcache",
    "kvcache_workspace_size": "parallax_gen.runtime.kvcache",
    "batch_invariant": "parallax_gen.runtime.invariance",
    "GraphedDecode": "parallax_gen.runtime.graphed",
    "KernelSpec": "parallax_gen.problem.spec",
    "Shape": "parallax_gen.problem.shapes",
    "lock": "parallax_gen.api.lock",
    "prepare": "parallax_gen.api.prepare",
    "record": "parallax_gen.runtime.recording",
    "tune": "parallax_gen.api.tune",
    "tune_first_calls": "parallax_gen.api.first_calls",
    "use_lock": "parallax_gen.runtime.locking",
    "State": "parallax_gen.runtime.states",
    "merge_states": "parallax_gen.runtime.states",
}


def __getattr__(name: str) -> Any:
    if name == "nn":
        return import_module("parallax_gen.nn")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
