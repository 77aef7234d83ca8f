"""Triton's CPU interpreter without work that has no effect, which takes half of the time of kernels of small blocks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest


def leave_out_what_has_no_effect(patch: pytest.MonkeyPatch) -> None:
    """Patch the interpreter of this process."""
    from triton.runtime import interpreter

    replace_once_a_launch(patch)
    # The interpreter computes whether an integer operation overflows, and asserts nothing: it has no debug mode.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))


def replace_once_a_launch(patch: pytest.MonkeyPatch) -> None:
    """While a kernel runs, the interpreter's functions stand in for those of triton.language. Triton replaces them at
    the launch, and again at each call of a device function, such as tl.sum, which takes a millisecond."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace_functions = interpreter._patch_lang
    replaced: set[tuple[bool, bool]] = set()  # in this launch

    def replace_functions_once(fn: Any) -> Any:
        visible = fn.__globals__.values()
        modules = (any(x is tl for x in visible), any(x is tl.core for x in visible))
        if modules in replaced:
            return None  # fn is a device function: its caller does not restore them
        is_launch = not replaced
        replaced.add(modules)
        scope = replace_functions(fn)
        if not is_launch:
            return None

        def restore() -> None:
            replaced.clear()
            scope.restore()

        return SimpleNamespace(restore=restore)

    patch.setattr(interpreter, "_patch_lang", replace_functions_once)
