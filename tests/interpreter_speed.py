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
    remember_types(patch)
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


def remember_types(patch: pytest.MonkeyPatch) -> None:
    """Compute a block's type, a tensor's shape and NumPy's dtype once for equal ones. The interpreter makes them anew
    at every operation, which takes a third of the time where blocks are small."""
    from triton.language import core
    from triton.runtime import interpreter

    block_type, tensor, constexpr = core.block_type, core.tensor, core.constexpr
    new_block_type, new_tensor = block_type.__init__, tensor.__init__
    find_dtype, unwrap = interpreter._get_np_dtype, core._unwrap_if_constexpr
    of_block: dict[tuple[Any, ...], dict[str, Any]] = {}
    of_tensor: dict[str, tuple[Any, Any]] = {}
    dtypes: dict[str, Any] = {}

    def unwrap_soon(o: Any) -> Any:
        kind = type(o)
        if kind is constexpr:
            return o.value
        return o if kind in (int, bool, float, str, tensor, core.dtype) else unwrap(o)

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = (element_ty.name, *[unwrap_soon(size) for size in shape])
        if sizes in of_block:
            self.__dict__.update(of_block[sizes], element_ty=element_ty)
        else:
            new_block_type(self, element_ty, shape)
            of_block[sizes] = dict(self.__dict__)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name in of_tensor:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = of_tensor[type.name]
        else:
            new_tensor(self, handle, type)
            of_tensor[type.name] = self.shape, self.numel

    def get_np_dtype(tt_dtype: Any) -> Any:
        if tt_dtype.name not in dtypes:
            dtypes[tt_dtype.name] = find_dtype(tt_dtype)
        return dtypes[tt_dtype.name]

    patch.setattr(core, "_unwrap_if_constexpr", unwrap_soon)
    patch.setattr(block_type, "__init__", init_block_type)
    patch.setattr(tensor, "__init__", init_tensor)
    patch.setattr(interpreter, "_get_np_dtype", get_np_dtype)
