"""The one hook into Triton's JIT: what a rendered file's `launch` hands its kernels, and what was compiled for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel, as `kernel[grid](*arguments, **options)` says it; compiled: what Triton ran."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    compiled: Any


_WATCHING = threading.RLock()  # a kernel's `run` is replaced by one thread at a time


@contextmanager
def watching(module: ModuleType, watch: Callable[[Launch], None], *, compile_only: bool = False) -> Iterator[None]:
    """Tell `watch` of every launch by this thread of a module's kernels; with compile_only nothing is run."""
    from triton.runtime.jit import JITFunction

    kernels = [value for value in vars(module).values() if isinstance(value, JITFunction)]
    here = threading.get_ident()

    def watched(kernel: Any) -> Callable[..., Any]:
        run = kernel.run

        def run_and_tell(*arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            ours = threading.get_ident() == here
            compiled = run(*arguments, grid=grid, warmup=warmup or (ours and compile_only), **options)
            if ours:
                watch(Launch(kernel, grid, arguments, options, compiled))
            return compiled

        return run_and_tell

    with _WATCHING:
        for kernel in kernels:
            kernel.run = watched(kernel)
        try:
            yield
        finally:
            for kernel in kernels:
                del kernel.run  # the method shows again
