"""Runs a hub package where this package and its dependencies cannot be imported; writes the results.

python hub_program.py BUILD INPUTS OUTPUTS
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ABSENT = {
    "parallax_gen",
    "platformdirs",
    "jinja2",
    "markupsafe",
    "optuna",
    "sqlite_utils",
    "sqlalchemy",
    "click",
    "rich",
}


def find_spec(name, path=None, target=None, find=PathFinder.find_spec):  # type: ignore[no-untyped-def]
    return None if name.partition(".")[0] in ABSENT else find(name, path, target)


TESTS = Path(__file__).parents[1]


def main(build: str, inputs_file: str, outputs_file: str) -> None:
    PathFinder.find_spec = find_spec  # type: ignore[method-assign]
    sys.path.append(str(TESTS))
    import torch
    from interpreter_speed import leave_out_what_has_no_effect

    leave_out_what_has_no_effect(pytest.MonkeyPatch())

    spec = importlib.util.spec_from_file_location("a_kernel_of_the_hub", Path(build) / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    attention = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = attention
    spec.loader.exec_module(attention)

    inputs = torch.load(inputs_file)
    q, r, k, v = (inputs[name].requires_grad_() for name in "qrkv")
    out = attention.parallax_attn_func(q, r, k, v, causal=True)
    out.backward(inputs["do"])
    results = {"out": out.detach(), **{f"d{name}": inputs[name].grad for name in "qrkv"}}
    with torch.no_grad():
        results["forward"] = attention.parallax_attn_func(q, r, k, v, causal=True)
        last = (q[:, -1:].contiguous(), r[:, -1:].contiguous())
        results["decode"] = attention.parallax_attn_with_kvcache(*last, k, v)
        results["own lengths"] = attention.parallax_attn_with_kvcache(*last, k, v, cache_seqlens=inputs["lengths"])
        pages = {"cache_seqlens": inputs["lengths"], "page_table": inputs["table"]}
        results["pages"] = attention.parallax_attn_with_kvcache(*last, inputs["k_pages"], inputs["v_pages"], **pages)
    loaded = ABSENT & {name.partition(".")[0] for name in sys.modules}
    assert not loaded, loaded
    torch.save(results, outputs_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
