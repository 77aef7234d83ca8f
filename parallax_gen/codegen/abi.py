"""The arguments of a rendered kernel's `launch`, and the tensors for it. The op defines which, and their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallax_gen.errors import ArgumentError
from parallax_gen.ops.base import PADDED_TO, KernelConfig, op_of
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    import torch


@dataclass
class Inputs:
    """The inputs of one call, on any device ("meta" tensors have sizes only).

    Dense: q, r (batch, seqlen_q, heads, head_dim); k, v (batch, seqlen_kv, kv_heads, head_dim). Packed: (total_q,
    heads, head_dim) and (total_k, kv_heads, head_dim), with cu_seqlens. Paged: k, v (pages, page_size, kv_heads,
    head_dim), with page_table (batch, pages per sequence). Inputs that a kernel does not take are None or 0.

    softcap
            the cap of the scores; 0 for no cap
    do      the gradient of the output, like q
    row_stats
            dkdv, dqdr: the output of preprocess, see `empty_row_stats`
    out, lse, t_mean, v_mean
            preprocess: the outputs of the forward, out and v_mean like q; lse and t_mean (batch, heads, seqlen_q) fp32
    """

    q: torch.Tensor
    r: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache_seqlens: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    window_size: int = 0
    softcap: float = 0.0
    do: torch.Tensor | None = None
    row_stats: torch.Tensor | None = None
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    t_mean: torch.Tensor | None = None
    v_mean: torch.Tensor | None = None


@dataclass
class Call:
    """One call: its inputs, its outputs by name in the order of `launch`, and its scratch."""

    spec: KernelSpec
    inputs: Inputs
    written: dict[str, torch.Tensor]
    scratch: tuple[torch.Tensor, ...]  # the split-KV scratch and the arrival counters, if the config needs them

    @property
    def out(self) -> torch.Tensor:
        return self.written["out"]

    def arguments(self, softmax_scale: float) -> tuple[object, ...]:
        """The arguments in the order of `launch`."""
        x = self.inputs
        named = vars(x) | self.written
        if self.spec.cache_dtype:
            named |= {"k": as_int32(x.k), "v": as_int32(x.v)}
        op = op_of(self.spec)
        tensors = [named[name] for name in (*op.inputs(self.spec), *op.written(self.spec), *op.lengths(self.spec))]
        scalars = launch_scalars(self.spec, softmax_scale, x.softcap, x.window_size, x.max_seqlen_q, x.max_seqlen_k)
        return (*tensors, *self.scratch, *scalars)


def launch_scalars(
    spec: KernelSpec,
    softmax_scale: float,
    softcap: float | None,
    window_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[float, ...]:
    """The scalars that `launch` takes after the tensors: scales, the window, and the longest sequences."""
    named = {"softmax_scale": softmax_scale, "softcap": softcap or 0.0}
    named |= {"window_size": window_size, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    op = op_of(spec)
    return tuple([named[name] for name in (*op.scales_taken(spec), *op.sizes(spec))])


def empty_row_stats(lse: torch.Tensor, sequences: int = 0) -> torch.Tensor:
    """An uninitialised output of preprocess, four fp32 statistics per query row: (4, batch, heads, padded).

    lse2 = log2(e) lse, or inf for a row without keys; w_bias = softmax_scale (1 + t_mean); dp_mean = do·v_mean;
    c = softmax_scale (dp_mean - delta) with delta = do·o. Each sequence's rows are padded to a multiple of PADDED_TO;
    the padding of the first statistic is inf.

    sequences  how many packed ones, if packed: the shape is (4, heads, padded), and sequence b begins at
               (cu_seqlens_q[b] + PADDED_TO * b) // PADDED_TO * PADDED_TO, which leaves room for each one's padding
    """
    import torch

    padded = -(-lse.shape[-1] // PADDED_TO) * PADDED_TO + sequences * PADDED_TO
    return torch.empty((4, *lse.shape[:-1], padded), dtype=torch.float32, device=lse.device)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a spec's dtype or cache_dtype. Raises ArgumentError."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
    dtypes |= {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    if name not in dtypes:
        raise ArgumentError("dtype", repr(name), ", ".join(dtypes))
    return dtypes[name]


def cache_dtype(spec: KernelSpec) -> torch.dtype:
    """The torch dtype of the keys and values."""
    return torch_dtype(spec.cache_dtype or spec.dtype)


def as_int32(cache: torch.Tensor) -> torch.Tensor:
    """An 8-bit cache as kernels take it: four numbers packed in an int32."""
    import torch

    return cache.view(torch.int32)


def empty_inputs(spec: KernelSpec, shape: Shape, device: str) -> Inputs:
    """Contiguous, uninitialised inputs of a shape; packed sequences all have the same length."""
    import torch

    def empty(*size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(size, dtype=dtype or torch_dtype(spec.dtype), device=device)

    op = op_of(spec)
    names, lengths = op.inputs(spec), op.lengths(spec)
    rows: tuple[int, ...] = (shape.batch, shape.seqlen_q)
    keys: tuple[int, ...] = (shape.batch, shape.seqlen_kv)
    stats: tuple[int, ...] = (shape.batch, shape.heads, shape.seqlen_q)
    if spec.varlen:
        rows, stats = (shape.batch * shape.seqlen_q,), (shape.heads, shape.batch * shape.seqlen_q)
    if "cu_seqlens_k" in lengths:
        keys = (shape.batch * shape.seqlen_kv,)
    pages = -(-shape.seqlen_kv // spec.page_size) if spec.page_size else 0
    if pages:
        keys = (shape.batch * pages, spec.page_size)
    q = empty(*rows, shape.heads, spec.head_dim)
    k, v = (empty(*keys, shape.kv_heads, spec.head_dim, dtype=cache_dtype(spec)) for _ in range(2))
    inputs = Inputs(q, torch.empty_like(q), k, v, window_size=shape.window, softcap=float(spec.softcap))
    if spec.varlen:
        inputs.max_seqlen_q, inputs.max_seqlen_k = shape.seqlen_q, shape.seqlen_kv
    sizes = {
        "cu_seqlens_q": (shape.batch + 1,),
        "cu_seqlens_k": (shape.batch + 1,),
        "cache_seqlens": (shape.batch,),
        "cache_leftpad": (shape.batch,),
        "page_table": (shape.batch, pages),
    }
    for name in lengths:
        if name in sizes:
            setattr(inputs, name, empty(*sizes[name], dtype=torch.int32))
        else:  # scales
            setattr(inputs, name, empty(shape.kv_heads, dtype=torch.float32))
    for name in names:
        if name in ("do", "out", "v_mean"):
            setattr(inputs, name, torch.empty_like(q))
        elif name in ("lse", "t_mean"):
            setattr(inputs, name, empty(*stats, dtype=torch.float32))
        elif name == "row_stats":
            lse = empty(*stats, dtype=torch.float32)
            inputs.row_stats = empty_row_stats(lse, shape.batch if spec.varlen else 0)
    return inputs


# Output -> the input with the same size and dtype.
SHAPED_LIKE = {"out": "q", "v_mean": "q", "dq": "q", "dr": "q", "dk": "k", "dv": "v"}


def prepare(spec: KernelSpec, config: KernelConfig, inputs: Inputs) -> Call:
    """The call on these inputs. Allocates outputs and scratch, uninitialised except for the counters."""
    import torch

    op, x, device = op_of(spec), inputs, inputs.q.device
    written = {}
    for name in op.written(spec):
        if name in SHAPED_LIKE:
            written[name] = torch.empty_like(getattr(x, SHAPED_LIKE[name]))
        elif name == "row_stats":
            assert x.lse is not None
            written[name] = empty_row_stats(x.lse, 0 if x.cu_seqlens_q is None else x.cu_seqlens_q.shape[0] - 1)
        else:
            stats = (*x.q.shape[:-3], x.q.shape[-2], x.q.shape[-3])
            written[name] = torch.empty(stats, dtype=torch.float32, device=device)
    batch = x.q.shape[0] if x.cache_seqlens is None else x.cache_seqlens.shape[0]
    needed = op.scratch(spec, config, batch, x.k.shape[-2], x.max_seqlen_q if spec.varlen else x.q.shape[1])
    scratch: tuple[torch.Tensor, ...] = ()
    if needed.floats:
        scratch += (torch.empty(needed.floats, dtype=torch.float32, device=device),)
    if needed.counters:
        scratch += (torch.zeros(needed.counters, dtype=torch.int32, device=device),)
    return Call(spec, inputs, written, scratch)
