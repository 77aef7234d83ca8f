"""The only hook into Triton's JIT: sees the arguments of each kernel launch, and the compiled kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel, `kernel[grid](*arguments, **options)`. compiled: the kernel that Triton ran."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    compiled: Any


_PATCH_LOCK = threading.RLock()  # one thread at a time replaces a kernel's `run`


@contextmanager
def watch_launches(
    module: ModuleType, watch: Callable[[Launch], None], *, compile_only: bool = False
) -> Iterator[None]:
    """Pass every launch of a module's kernels by this thread to `watch`. compile_only: compile, but launch nothing."""
    from triton.runtime.jit import JITFunction

    kernels = [value for value in vars(module).values() if isinstance(value, JITFunction)]
    here = threading.get_ident()

    def watched(kernel: Any) -> Callable[..., Any]:
        run = kernel.run

        def run_and_report(*arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            ours = threading.get_ident() == here
            compiled = run(*arguments, grid=grid, warmup=warmup or (ours and compile_only), **options)
            if ours:
                watch(Launch(kernel, grid, arguments, options, compiled))
            return compiled

        return run_and_report

    with _PATCH_LOCK:
        for kernel in kernels:
            kernel.run = watched(kernel)
        try:
            yield
        finally:
            for kernel in kernels:
                del kernel.run  # uncovers the method
