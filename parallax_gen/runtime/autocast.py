"""What torch.autocast means for the public functions: all of them cast by the two functions here."""

from __future__ import annotations

import torch
from torch import Tensor

from parallax_gen.runtime.checks import DTYPE_NAMES

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def cast_inputs(q: Tensor, r: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Inputs:
    """q, r, k and v in autocast's dtype, as torch's own attention casts; as they are where autocast is off.

    With `out` they are cast to its dtype: torch leaves calls with out= to the dtype of out.
    """
    dtype = autocast_dtype(q)
    return (q, r, k, v) if dtype is None else _cast(_dtype_of(out) or dtype, q, r, k, v)


def cast_to_cache(q: Tensor, r: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor | None = None) -> Inputs:
    """`cast_inputs` for caches: q and r are cast to a 16-bit cache's dtype, since casting a cache copies all of it.

    A cache in fp32 is cast, and copied; one in eight bits never is.
    """
    dtype = autocast_dtype(q)
    if dtype is None:
        return q, r, k_cache, v_cache
    cached = _dtype_of(k_cache)
    if cached is not None and cached != torch.float32:
        dtype = cached
    return _cast(_dtype_of(out) or dtype, q, r, k_cache, v_cache)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What torch.autocast casts to on x's device; None where it is off, or x is no CUDA or CPU tensor."""
    if not isinstance(x, Tensor) or not (x.is_cuda or x.is_cpu):
        return None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _dtype_of(x: Tensor | None) -> torch.dtype | None:
    """One that the functions compute in, or None."""
    return x.dtype if isinstance(x, Tensor) and x.dtype in DTYPE_NAMES else None


def _cast(dtype: torch.dtype, q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """What is no tensor, or of a dtype that the functions do not take, stays as it is: their checks name it."""
    q, r, k, v = (x if _dtype_of(x) is None else x.to(dtype) for x in (q, r, k, v))
    return q, r, k, v
