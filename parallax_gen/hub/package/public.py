"""Parallax attention: softmax attention minus a learned correction by the covariance of keys and values.

Its Triton kernels were rendered by parallax_gen for the specs that `specs()` lists, and are those that parallax_gen
launches itself. Other calls raise ArgumentError.
"""

from __future__ import annotations

from parallax_gen.errors import ArgumentError, ParallaxGenError
from parallax_gen.hub.package import layers
from parallax_gen.hub.package.records import cards as _cards
from parallax_gen.hub.package.records import specs as _specs
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.functional import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.runtime.invariance import batch_invariant
from parallax_gen.runtime.kvcache import kvcache_workspace_size, parallax_attn_with_kvcache
from parallax_gen.runtime.states import State, merge_states

__all__ = [
    "ArgumentError",
    "KernelSpec",
    "ParallaxGenError",
    "State",
    "batch_invariant",
    "cards",
    "kvcache_workspace_size",
    "layers",
    "merge_states",
    "parallax_attn_func",
    "parallax_attn_varlen_func",
    "parallax_attn_with_kvcache",
    "specs",
]


def specs() -> list[KernelSpec]:
    """What this package has kernels of; its str is readable."""
    return list(_specs())


def cards() -> list[str]:
    """The cards whose kernels this package has."""
    return list(_cards())
