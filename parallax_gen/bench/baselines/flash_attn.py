"""Softmax attention of flash-attn 2, 3 and 4, if installed, in layout (batch, seqlen, heads, head_dim)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parallax_gen.bench.baselines.base import (
    NO_LENGTHS,
    Baseline,
    Call,
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

    boundless  the value of an unlimited window on either side
    pages      flash_attn_with_kvcache's name for the page table; "" if there is no such function
    """

    module: str
    boundless: int | None
    pages: str

    def attention(self, spec: KernelSpec, x: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Call:
        """With the window and the softcap of x. Raises ImportError or NotImplementedError."""
        attend = self._function("flash_attn_func")
        _check(spec)
        given = self._options(spec, x)
        return lambda: _first(attend(q, k, v, **given))

    def forward(self, spec: KernelSpec, x: Inputs) -> Call:
        return self.attention(spec, x, x.q, x.k, x.v)

    def step(self, spec: KernelSpec, x: Inputs) -> Step:
        q, k, v = leaves(x.q, x.k, x.v)
        return Step(self.attention(spec, x, q, k, v), (q, k, v), gradient_of_output(x))

    def decode(self, spec: KernelSpec, x: Inputs) -> Call:
        """Raises ImportError or NotImplementedError."""
        if not self.pages:
            return self._decode_without_cache(spec, x)
        attend = self._function("flash_attn_with_kvcache")
        _check(spec)
        refuse_unsupported(spec, cache_dtype="its 8-bit caches are not benchmarked")
        given = self._options(spec, x)
        cache = {"cache_seqlens": x.cache_seqlens, "cache_leftpad": x.cache_leftpad, self.pages: x.page_table}
        given |= {
            name: tensor for name, tensor in cache.items() if tensor is not None
        }  # older versions lack some of these parameters
        return lambda: _first(attend(x.q, x.k, x.v, **given))

    def _decode_without_cache(self, spec: KernelSpec, x: Inputs) -> Call:
        """Decode as a forward over few queries, with splits if supported."""
        attend = self._function("flash_attn_func")
        _check(spec)
        refuse_unsupported(spec, lengths=f"{NO_LENGTHS} in the function benchmarked here")
        given = {"softcap": x.softcap} if spec.softcap else {}
        try:
            _first(attend(x.q, x.k, x.v, num_splits=0, **given))
        except (AssertionError, NotImplementedError):
            return lambda: _first(attend(x.q, x.k, x.v, **given))
        return lambda: _first(attend(x.q, x.k, x.v, num_splits=0, **given))

    def _options(self, spec: KernelSpec, x: Inputs) -> dict[str, Any]:
        window = (x.window_size - 1, 0) if x.window_size else (self.boundless, self.boundless)
        options: dict[str, Any] = {"causal": spec.causal, "window_size": window}
        return options | ({"softcap": x.softcap} if spec.softcap else {})

    def _function(self, name: str) -> Callable[..., Any]:
        try:
            found: Callable[..., Any] = getattr(importlib.import_module(self.module), name)
        except AttributeError as error:  # the package of another generation has the same module name
            raise ImportError(f"{self.module} has no {name}") from error
        return found


FLASH = {
    "flash-attn 2": Flash("flash_attn", -1, "block_table"),
    "flash-attn 3": Flash("flash_attn_interface", -1, "page_table"),
    "flash-attn 4": Flash("flash_attn.cute", None, ""),
}


def _check(spec: KernelSpec) -> None:
    if spec.bytes_per_element != 2:
        raise NotImplementedError("it has only bf16 and fp16")
    refuse_unsupported(spec, varlen="its packed sequences are not benchmarked")


def _first(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output; some versions also return statistics."""
    return found[0] if isinstance(found, tuple) else found


PACKAGES = {
    "flash-attn 2": ("flash-attn",),
    "flash-attn 3": ("flash-attn-3", "flashattn-hopper"),  # one of these names
    "flash-attn 4": ("flash-attn-4",),
}
BASELINES = tuple(
    Baseline(name, of.forward, of.decode, of.step, softmax=True, softcap=True, packages=PACKAGES[name])
    for name, of in FLASH.items()
)
