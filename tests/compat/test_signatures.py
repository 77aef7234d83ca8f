"""The names and signatures of the drop-ins are exactly those of the original packages."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest

# From the sources of parallax-kernel 0.1.1 and fla-core 0.6.0, without annotations.
SIGNATURES = {
    "parallax_kernel": {
        "parallax_func": "(q, r, k, v, qk_scale=None, window_size_left=-1)",
        "parallax_varlen_func": "(q, r, k, v, qk_scale=None, window_size_left=-1, cu_seqlens=None)",
        "parallax_fwd": "(q, r, k, v, qk_scale, n_rep=1, window_size_left=-1)",
        "parallax_bwd": "(q, r, k, v, o, barv, d1, bart, m, grad_o, qk_scale, n_rep=1, window_size_left=-1)",
        "parallax_reference": "(q, r, k, v, qk_scale, *, causal=True, window_size_left=-1)",
        "parallax_attn_with_kvcache": "(q, r, k_cache, v_cache, *, page_table=None, seqused_k=None,"
        " window_size=None, scale=None, out=None)",
        "parallax_decode": "(q, r, k, v, qk_scale, *, window_size_left=-1, out=None)",
        "GraphedDecode": "(B, H, max_kv_len=None, head_dim=128, *, H_kv=None, dtype=torch.bfloat16, window_size=None,"
        " scale=None, device='cuda', warmup=3, kv_len=None)",
        "GraphedDecode.replay": "(self)",
        "GraphedDecode.__call__": "(self, *, q=None, r=None, k=None, v=None, cache_seqlens=None)",
    },
    "parallax_kernel_triton": {
        "parallax_func": "(q, r, k, v, qk_scale=None, window_size_left=-1)",
        "parallax_varlen_func": "(q, r, k, v, qk_scale=None, window_size_left=-1, cu_seqlens=None)",
        "parallax_fwd": "(q, r, k, v, qk_scale, n_rep=1, window_size_left=-1)",
        "parallax_bwd": "(q, r, k, v, o, barv, d1, bart, m, grad_o, qk_scale, n_rep=1, window_size_left=-1)",
        "parallax_decode": "(q, r, k, v, qk_scale=None, *, window_size_left=-1, cache_start=None)",
    },
    "fla": {
        "parallel_parallax": "(q, r, k, v, scale=None, window_size=None, cu_seqlens=None)",
        "naive_parallax": "(q, r, k, v, scale=None, window_size=None, causal=True)",
        "parallax_decode": "(q, r, k, v, scale=None, window_size=None, cache_start=None)",
        "parallax_decode_one_step": "(q, r, k, v, scale=None, window_size=None, cache_start=None)",
    },
}


def signature_text(function: Any) -> str:
    """The signature with names, kinds and defaults only."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in SIGNATURES.items() for name in names])
def test_signature(module: str, name: str) -> None:
    result: Any = import_module(f"parallax_gen.compat.{module}")
    for part in name.split("."):
        result = getattr(result, part)
    assert signature_text(result) == SIGNATURES[module][name]


@pytest.mark.parametrize("module", SIGNATURES)
def test_names(module: str) -> None:
    offered = {name for name in SIGNATURES[module] if "." not in name}
    offered |= {"cute_decode_available"} if module == "parallax_kernel" else set()
    assert set(import_module(f"parallax_gen.compat.{module}").__all__) == offered
