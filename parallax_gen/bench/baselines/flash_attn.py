"""flash-attn 2, 3 and 4, where they are installed: softmax attention of (batch, seqlen, heads, head_dim)."""

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
    check_lacking,
    gradient_of_output,
    leaves,
)
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from parallax_gen.codegen.abi import Inputs


@dataclass(frozen=True)
class Flash:
    """One of them: where it is imported from, and what differs between their signatures.

    boundless  the window, on either side, that is none
    pages      what flash_attn_with_kvcache calls the page table; "" where there is no such function
    """

    module: str
    boundless: int | None
    pages: str

    def attention(self, spec: KernelSpec, q: Tensor, k: Tensor, v: Tensor, window: int) -> Call:
        """Raises ImportError or NotImplementedError; `window` is the keys that a query sees, 0 for all."""
        attend = self._function("flash_attn_func")
        _check(spec)
        given = {"causal": spec.causal, "window_size": self._window(window)}
        return lambda: _first(attend(q, k, v, **given))

    def forward(self, spec: KernelSpec, x: Inputs) -> Call:
        return self.attention(spec, x.q, x.k, x.v, x.window_size)

    def step(self, spec: KernelSpec, x: Inputs) -> Step:
        q, k, v = leaves(x.q, x.k, x.v)
        return Step(self.attention(spec, q, k, v, x.window_size), (q, k, v), gradient_of_output(x))

    def decode(self, spec: KernelSpec, x: Inputs) -> Call:
        """Raises ImportError or NotImplementedError."""
        if not self.pages:
            return self._decode_without_cache(spec, x)
        attend = self._function("flash_attn_with_kvcache")
        _check(spec)
        check_lacking(spec, cache_dtype="its caches in eight bits are not compared")
        given: dict[str, Any] = {"causal": spec.causal, "window_size": self._window(x.window_size)}
        cache = {"cache_seqlens": x.cache_seqlens, "cache_leftpad": x.cache_leftpad, self.pages: x.page_table}
        given |= {name: tensor for name, tensor in cache.items() if tensor is not None}  # older versions lack some
        return lambda: _first(attend(x.q, x.k, x.v, **given))

    def _decode_without_cache(self, spec: KernelSpec, x: Inputs) -> Call:
        """As a forward over few queries: split where that is supported."""
        attend = self._function("flash_attn_func")
        _check(spec)
        check_lacking(spec, lengths=f"{NO_LENGTHS} in what is compared")
        try:
            _first(attend(x.q, x.k, x.v, num_splits=0))
        except (AssertionError, NotImplementedError):
            return lambda: _first(attend(x.q, x.k, x.v))
        return lambda: _first(attend(x.q, x.k, x.v, num_splits=0))

    def _window(self, window: int) -> tuple[int | None, int | None]:
        return (window - 1, 0) if window else (self.boundless, self.boundless)

    def _function(self, name: str) -> Callable[..., Any]:
        try:
            found: Callable[..., Any] = getattr(importlib.import_module(self.module), name)
        except AttributeError as error:  # another generation's package of the same name
            raise ImportError(f"{self.module} has no {name}") from error
        return found


FLASH = {
    "flash-attn 2": Flash("flash_attn", -1, "block_table"),
    "flash-attn 3": Flash("flash_attn_interface", -1, "page_table"),
    "flash-attn 4": Flash("flash_attn.cute", None, ""),
}


def _check(spec: KernelSpec) -> None:
    if spec.bytes_per_element != 2:
        raise NotImplementedError("it has bf16 and fp16 alone")
    check_lacking(spec, varlen="its packed sequences are not compared")


def _first(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output; some versions give statistics beside it."""
    return found[0] if isinstance(found, tuple) else found


PACKAGES = {
    "flash-attn 2": ("flash-attn",),
    "flash-attn 3": ("flash-attn-3", "flashattn-hopper"),  # one of these names
    "flash-attn 4": ("flash-attn-4",),
}
BASELINES = tuple(
    Baseline(name, of.forward, of.decode, of.step, softmax=True, packages=PACKAGES[name]) for name, of in FLASH.items()
)
