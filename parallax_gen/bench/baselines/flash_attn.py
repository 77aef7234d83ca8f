"""Softmax attention of flash-attn 2, 3 and 4, if installed, in layout (batch, seqlen, heads, head_dim)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parallax_gen.bench.baselines.base import (
    NO_LENGTHS,
    AttentionCall,
    Baseline,
    Step,
    gradient_of_output,
    leaves,
    refuse_unsupported,
)
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from parallax_gen.codegen.abi import Inputs


@dataclass(frozen=True)
class Flash:
    """One generation of flash-attn: its module, and how its signatures differ.

    no_window        the window_size of a side that means no limit
    page_table_name  flash_attn_with_kvcache's argument for the page table; "" if there is no such function
    """

    module: str
    no_window: int | None
    page_table_name: str

    def attention(self, spec: KernelSpec, x: Inputs, q: Tensor, k: Tensor, v: Tensor) -> AttentionCall:
        """With the window and the softcap of x. Raises ImportError or NotImplementedError."""
        attend = self._function("flash_attn_func")
        _check_supported(spec)
        options = self._options(spec, x)
        return lambda: _output(attend(q, k, v, **options))

    def forward(self, spec: KernelSpec, x: Inputs) -> AttentionCall:
        return self.attention(spec, x, x.q, x.k, x.v)

    def step(self, spec: KernelSpec, x: Inputs) -> Step:
        q, k, v = leaves(x.q, x.k, x.v)
        return Step(self.attention(spec, x, q, k, v), (q, k, v), gradient_of_output(x))

    def decode(self, spec: KernelSpec, x: Inputs) -> AttentionCall:
        """Raises ImportError or NotImplementedError."""
        if not self.page_table_name:
            return self._decode_without_cache(spec, x)
        attend = self._function("flash_attn_with_kvcache")
        _check_supported(spec)
        refuse_unsupported(spec, cache_dtype="its 8-bit caches are not benchmarked")
        options = self._options(spec, x)
        cache = {"cache_seqlens": x.cache_seqlens, "cache_leftpad": x.cache_leftpad, self.page_table_name: x.page_table}
        # Arguments that are None are left out, because older versions lack some of these parameters.
        options |= {name: tensor for name, tensor in cache.items() if tensor is not None}
        return lambda: _output(attend(x.q, x.k, x.v, **options))

    def _decode_without_cache(self, spec: KernelSpec, x: Inputs) -> AttentionCall:
        """Decode as a forward over few queries, with splits if supported."""
        attend = self._function("flash_attn_func")
        _check_supported(spec)
        refuse_unsupported(spec, lengths=f"{NO_LENGTHS} in the function benchmarked here")
        options = {"softcap": x.softcap} if spec.softcap else {}
        try:
            _output(attend(x.q, x.k, x.v, num_splits=0, **options))
        except (AssertionError, NotImplementedError):
            return lambda: _output(attend(x.q, x.k, x.v, **options))
        return lambda: _output(attend(x.q, x.k, x.v, num_splits=0, **options))

    def _options(self, spec: KernelSpec, x: Inputs) -> dict[str, Any]:
        window = (x.window_size - 1, 0) if x.window_size else (self.no_window, self.no_window)
        options: dict[str, Any] = {"causal": spec.causal, "window_size": window}
        return options | ({"softcap": x.softcap} if spec.softcap else {})

    def _function(self, name: str) -> Callable[..., Any]:
        try:
            function: Callable[..., Any] = getattr(importlib.import_module(self.module), name)
        except AttributeError as error:  # another generation of flash-attn has a module of the same name
            raise ImportError(f"{self.module} has no {name}") from error
        return function


FLASH = {
    "flash-attn 2": Flash("flash_attn", -1, "block_table"),
    "flash-attn 3": Flash("flash_attn_interface", -1, "page_table"),
    "flash-attn 4": Flash("flash_attn.cute", None, ""),
}


def _check_supported(spec: KernelSpec) -> None:
    if spec.bytes_per_element != 2:
        raise NotImplementedError("it has only bf16 and fp16")
    refuse_unsupported(spec, varlen="its packed sequences are not benchmarked")


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of a call; some versions also return statistics."""
    return result[0] if isinstance(result, tuple) else result


PACKAGES = {
    "flash-attn 2": ("flash-attn",),
    "flash-attn 3": ("flash-attn-3", "flashattn-hopper"),  # published under either name
    "flash-attn 4": ("flash-attn-4",),
}
BASELINES = tuple(
    Baseline(name, flash.forward, flash.decode, flash.step, softmax=True, softcap=True, packages=PACKAGES[name])
    for name, flash in FLASH.items()
)
