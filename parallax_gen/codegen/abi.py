"""The one place that knows what a rendered kernel's `launch` takes besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallax_gen.errors import ArgumentError
from parallax_gen.ops.base import DecodeConfig, KernelConfig
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scratch:
    """Numbers of scratch that a launch needs: fp32 `partials` and int32 `arrived` counters (0 before and after)."""

    partials: int = 0
    arrived: int = 0


SPARE = 8  # of ragged decode, as in _schedule.j2


def scratch_of(spec: KernelSpec, config: KernelConfig, batch: int, kv_heads: int, seqlen_q: int = 1) -> Scratch:
    """What a launch at this size needs; nothing where every program finishes its own rows.

    seqlen_q  of decode with many queries: the longest sequence's
    """
    if not isinstance(config, DecodeConfig) or (config.NUM_SPLITS == 1 and not spec.ragged):
        return Scratch()
    if spec.ragged:  # a slot, of a tile's rows, for every program: see ragged.py.j2
        rows = config.BLOCK_H if spec.many_queries else min(spec.group, config.BLOCK_H)
        tiles = -(-spec.group * seqlen_q // config.BLOCK_H)
        many, groups = (batch * tiles, 1) if spec.many_queries else (batch, tiles)
        slots = groups * (many * config.NUM_SPLITS + -(-many // SPARE)) * kv_heads
        return Scratch(slots * rows * (2 * spec.head_dim + 4), slots if config.merge == "last" else 0)
    # Per query head and split: o1 and o2, and m, d1, d2 padded to four numbers.
    partials = batch * kv_heads * spec.group * config.NUM_SPLITS * (2 * spec.head_dim + 4)
    head_blocks = -(-spec.group // config.BLOCK_H)
    return Scratch(partials, batch * kv_heads * head_blocks if config.merge == "last" else 0)


@dataclass
class Inputs:
    """What one call is given, on any device ("meta" tensors hold sizes only).

    Dense: q, r (batch, seqlen_q, heads, head_dim); k, v (batch, seqlen_kv, kv_heads, head_dim). Packed: (total_q,
    heads, head_dim) and (total_k, kv_heads, head_dim), with cu_seqlens. Paged: k, v (pages, page_size, kv_heads,
    head_dim), with page_table (batch, pages a sequence). What a kernel does not take is None or 0.

    do      the gradient of the output, like q
    rows    dkdv, dqdr: what preprocess wrote, see `rows_like`
    saved   preprocess: what the forward wrote
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
    do: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    saved: Saved | None = None


@dataclass
class Saved:
    """What the forward leaves for the backward: out and v_mean like q; lse and t_mean (batch, heads, seqlen_q) fp32."""

    out: torch.Tensor
    lse: torch.Tensor
    t_mean: torch.Tensor
    v_mean: torch.Tensor


@dataclass
class Call:
    """One call: its inputs, the tensors it writes by name, in the order of `launch`, its scratch."""

    spec: KernelSpec
    inputs: Inputs
    written: dict[str, torch.Tensor]
    scratch: tuple[torch.Tensor, ...]  # partials, arrived: those that the config needs

    @property
    def out(self) -> torch.Tensor:
        return self.written["out"]

    def arguments(self, softmax_scale: float) -> tuple[object, ...]:
        """In the order in which `launch` takes them."""
        x = self.inputs
        tensors: list[torch.Tensor | None]
        if self.spec.op == "preprocess":
            assert x.saved is not None
            saved = x.saved
            tensors = [x.do, saved.out, saved.v_mean, saved.lse, saved.t_mean, *self.written.values(), x.cu_seqlens_q]
        else:
            tensors = [x.q, x.r, x.k, x.v]
            if self.spec.op in ("dkdv", "dqdr"):
                tensors += [x.do, x.rows]
            tensors += [*self.written.values(), x.cu_seqlens_q, x.cu_seqlens_k]
            tensors += [x.cache_seqlens, x.cache_leftpad, x.page_table, x.k_scale, x.v_scale]
            if self.spec.cache_dtype:
                tensors[2:4] = [in_fours(x.k), in_fours(x.v)]
            tensors += self.scratch
        sizes = sizes_of(self.spec, x.window_size, x.max_seqlen_q, x.max_seqlen_k)
        return (*[t for t in tensors if t is not None], softmax_scale, *sizes)


def sizes_of(spec: KernelSpec, window_size: int, max_seqlen_q: int, max_seqlen_k: int) -> tuple[int, ...]:
    """The numbers that `launch` takes behind softmax_scale: the window, and the longest sequence that it tiles."""
    longest = max_seqlen_k if spec.op == "dkdv" else max_seqlen_q
    return ((window_size,) if spec.window else ()) + ((longest,) if spec.varlen else ())


# Rows of a sequence are padded to a multiple of this where kernels step over them: every block of them is whole, and
# begins where wide loads may. The largest BLOCK_M.
ROWS = 128


def rows_like(lse: torch.Tensor, sequences: int = 0) -> torch.Tensor:
    """Room for what preprocess writes, four fp32 numbers a query row: (4, batch, heads, padded).

    log2(e) lse, or inf for a row without keys; softmax_scale (1 + t̄); b = do·v̄; softmax_scale (b - do·o). Each
    sequence's rows are padded to a multiple of ROWS, with inf for the first.

    sequences  of packed ones, how many: (4, heads, padded), and sequence b begins at (cu_seqlens_q[b] + 128 b) // 128
               * 128, which leaves room for each one's padding
    """
    import torch

    padded = -(-lse.shape[-1] // ROWS) * ROWS + sequences * ROWS
    return torch.empty((4, *lse.shape[:-1], padded), dtype=torch.float32, device=lse.device)


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a spec's dtype."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
    if name not in dtypes:
        raise ArgumentError("dtype", repr(name), ", ".join(dtypes))
    return dtypes[name]


def cache_dtype(spec: KernelSpec) -> torch.dtype:
    """torch's dtype of the keys and values."""
    import torch

    eight_bits = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    return eight_bits[spec.cache_dtype] if spec.cache_dtype else torch_dtype(spec.dtype)


def in_fours(cache: torch.Tensor) -> torch.Tensor:
    """Numbers of eight bits four by four, as kernels take them: in int32, a quarter as many to a row."""
    import torch

    return cache.view(torch.int32)


def empty_inputs(spec: KernelSpec, shape: Shape, device: str) -> Inputs:
    """Contiguous, uninitialised tensors of a shape; packed ones hold sequences that are all as long."""
    import torch

    def empty(*size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(size, dtype=dtype or torch_dtype(spec.dtype), device=device)

    rows: tuple[int, ...] = (shape.batch, shape.seqlen_q)
    keys: tuple[int, ...] = (shape.batch, shape.seqlen_kv)
    stats: tuple[int, ...] = (shape.batch, shape.heads, shape.seqlen_q)
    if spec.varlen:
        rows = (shape.batch * shape.seqlen_q,)
        keys = keys if spec.op == "decode" else (shape.batch * shape.seqlen_kv,)
        stats = (shape.heads, shape.batch * shape.seqlen_q)
    q, r = (empty(*rows, shape.heads, spec.head_dim) for _ in range(2))
    k, v = (empty(*keys, shape.kv_heads, spec.head_dim) for _ in range(2))
    inputs = Inputs(q, r, k, v, window_size=shape.window)
    if spec.varlen:
        inputs.cu_seqlens_q = empty(shape.batch + 1, dtype=torch.int32)
        inputs.max_seqlen_q, inputs.max_seqlen_k = shape.seqlen_q, shape.seqlen_kv
        if spec.op != "decode":
            inputs.cu_seqlens_k = empty(shape.batch + 1, dtype=torch.int32)
    if spec.ragged:
        inputs.cache_seqlens = empty(shape.batch, dtype=torch.int32)
    if spec.page_size:
        pages = -(-shape.seqlen_kv // spec.page_size)
        inputs.k, inputs.v = (
            empty(shape.batch * pages, spec.page_size, shape.kv_heads, spec.head_dim) for _ in range(2)
        )
        inputs.page_table = empty(shape.batch, pages, dtype=torch.int32)
    if spec.leftpad:
        inputs.cache_leftpad = empty(shape.batch, dtype=torch.int32)
    if spec.cache_dtype:
        inputs.k, inputs.v = (x.to(cache_dtype(spec)) for x in (inputs.k, inputs.v))
        inputs.k_scale, inputs.v_scale = (empty(shape.kv_heads, dtype=torch.float32) for _ in range(2))
    if spec.op in ("preprocess", "dkdv", "dqdr"):
        inputs.do = torch.empty_like(q)
        lse, t_mean = (empty(*stats, dtype=torch.float32) for _ in range(2))
        if spec.op == "preprocess":
            inputs.saved = Saved(torch.empty_like(q), lse, t_mean, torch.empty_like(q))
        else:
            inputs.rows = rows_like(lse, shape.batch if spec.varlen else 0)
    return inputs


def prepare(spec: KernelSpec, config: KernelConfig, inputs: Inputs) -> Call:
    """The call on these inputs: outputs and scratch beside them, uninitialised but for the counters."""
    import torch

    x, device = inputs, inputs.q.device
    if spec.op == "preprocess":
        assert x.saved is not None
        sequences = 0 if x.cu_seqlens_q is None else x.cu_seqlens_q.shape[0] - 1
        return Call(spec, inputs, {"rows": rows_like(x.saved.lse, sequences)}, ())
    if spec.op == "dkdv":
        return Call(spec, inputs, {"dk": torch.empty_like(x.k), "dv": torch.empty_like(x.v)}, ())
    if spec.op == "dqdr":
        return Call(spec, inputs, {"dq": torch.empty_like(x.q), "dr": torch.empty_like(x.r)}, ())
    written = {"out": torch.empty_like(x.q)}
    if spec.stats:
        rows = (*x.q.shape[:-3], x.q.shape[-2], x.q.shape[-3])
        written["lse"] = torch.empty(rows, dtype=torch.float32, device=device)
        written["t_mean"] = torch.empty_like(written["lse"])
        written["v_mean"] = torch.empty_like(x.q)
    batch = x.q.shape[0] if x.cache_seqlens is None else x.cache_seqlens.shape[0]
    seqlen_q = x.max_seqlen_q if spec.varlen else x.q.shape[1]
    needed = scratch_of(spec, config, batch, x.k.shape[-2], seqlen_q)
    scratch: tuple[torch.Tensor, ...] = ()
    if needed.partials:
        scratch += (torch.empty(needed.partials, dtype=torch.float32, device=device),)
    if needed.arrived:
        scratch += (torch.zeros(needed.arrived, dtype=torch.int32, device=device),)
    return Call(spec, inputs, written, scratch)
