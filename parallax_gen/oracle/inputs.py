"""Random inputs of a kernel, including outputs of the kernels before it. Memory that it must not read holds NaN."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallax_gen.codegen.abi import Inputs, cache_dtype, empty_row_stats, torch_dtype
from parallax_gen.errors import ArgumentError
from parallax_gen.ops.base import PADDED_TO, OpKind, op_of
from parallax_gen.oracle.kvcache import reference_cached_forward
from parallax_gen.oracle.peaked import Kind, peaked
from parallax_gen.oracle.reference import Reference, reference_forward, reference_varlen_forward
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import default_scale

POISON = float("nan")
# Scores have unit variance: at 2 the largest are cut to half; at 1e6 the error of the tanh is multiplied by 1e6.
CHECKED_SOFTCAPS = (2.0, 1e6)
PEAKED_SOFTCAP = 30.0  # leaves peaked rows peaked


def random_inputs(spec: KernelSpec, shape: Shape, *, seed: int, device: str, kind: Kind = "normal") -> Inputs:
    """Normal q, k and v of unit variance, and r scaled so that t has unit variance too; in the spec's dtype.

    The same seed gives the same numbers on the same kind of device.

    kind  what rows attend to: see `peaked.peaked`. For kinds other than "normal" r has unit variance
    """
    if shape.group != spec.group:
        raise ArgumentError("shape", f"{shape.group} query heads per kv head", f"{spec.group}, as the spec has")
    if op_of(spec).kind is OpKind.CACHE and shape.seqlen_q != 1 and not spec.multi_token:
        raise ArgumentError("shape", f"seqlen_q {shape.seqlen_q}", "seqlen_q 1 for decode without multi_token")
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(seqlen: int, heads: int) -> Tensor:
        size = (shape.batch, seqlen, heads, spec.head_dim)
        return torch.randn(size, dtype=torch_dtype(spec.dtype), device=device, generator=generator)

    q, r = normal(shape.seqlen_q, shape.heads), normal(shape.seqlen_q, shape.heads)
    k, v = normal(shape.seqlen_kv, shape.kv_heads), normal(shape.seqlen_kv, shape.kv_heads)
    softcap = CHECKED_SOFTCAPS[seed % 2]
    if kind == "normal":
        r *= default_scale(spec.head_dim)
    else:
        (q, k), softcap = peaked(kind, q, k, generator), PEAKED_SOFTCAP
    if r.data_ptr() < q.data_ptr():  # a descriptor of both needs q at the lower address: see ops/descriptors.py
        values_of_q = q.clone()
        q.copy_(r)
        r.copy_(values_of_q)
        q, r = r, q
    return Inputs(q, r, k, v, window_size=shape.window, softcap=softcap if spec.softcap else 0.0)


def random_inputs_of(
    spec: KernelSpec,
    shape: Shape,
    *,
    seed: int,
    device: str,
    full: bool = False,
    lengths: Sequence[int] | None = None,
    kind: Kind = "normal",
) -> Inputs:
    """Random inputs of a kernel, including outputs of the kernels before it.

    Per-sequence lengths, packed or not, are from 0 to the shape's length, or negative in a cache.

    full     whether all sequences have the shape's length
    lengths  the number of keys of each sequence of decode_varlen
    kind     see `random_inputs`

    The cache after the end of a sequence, and the rows before the first and after the last packed sequence, hold NaN.
    """
    return inputs_and_forward(spec, shape, seed=seed, device=device, full=full, lengths=lengths, kind=kind)[0]


def inputs_and_forward(
    spec: KernelSpec,
    shape: Shape,
    *,
    seed: int,
    device: str,
    full: bool,
    lengths: Sequence[int] | None = None,
    kind: Kind = "normal",
) -> tuple[Inputs, Reference | None]:
    """`random_inputs_of`, and for a kernel of the backward the forward's result in float64."""
    op = op_of(spec)
    inputs = random_inputs(spec, shape, seed=seed, device=device, kind=kind)
    if spec.cache_dtype:
        inputs.k, inputs.v = (x.to(cache_dtype(spec)) for x in (inputs.k, inputs.v))
        heads = shape.kv_heads if seed % 2 else 1  # one scale per head, or one for all
        draw = torch.Generator().manual_seed(seed)
        inputs.k_scale, inputs.v_scale = (torch.rand(heads, generator=draw).add(0.5).to(device) for _ in range(2))
    if op.per_sequence_lengths:
        keys = _lengths(shape.seqlen_kv, shape.batch, seed, full)
        if seed % 3 == 0 and not full:  # serving engines mark unused batch entries like this
            keys = torch.where(keys == 0, -1 if seed % 2 else -shape.seqlen_kv, keys)
        if lengths is not None:
            keys = torch.tensor(lengths, dtype=torch.int32)
        hidden = (torch.arange(shape.seqlen_kv) >= keys[:, None]).to(device)
        inputs.cache_seqlens = keys.to(device)
        if spec.leftpad:
            pads = _lengths(shape.seqlen_kv // 2 + 1, shape.batch, seed + 3, full=False) * (not full)
            hidden |= (torch.arange(shape.seqlen_kv) < pads[:, None]).to(device)
            inputs.cache_leftpad = pads.to(device)
        _poison(inputs.k, hidden)
        _poison(inputs.v, hidden)
    if spec.page_size:
        _page(inputs, spec.page_size, seed)
    if spec.varlen:
        _pack(inputs, shape, seed, full)
    read = op.inputs(spec)
    if "do" not in read:
        return inputs, None
    generator = torch.Generator(device=device).manual_seed(seed + 1)
    do = torch.randn(inputs.q.shape, device=device, generator=generator)
    inputs.do = do.to(inputs.q.dtype)
    if inputs.cu_seqlens_q is not None:
        _poison_padding(inputs.do, inputs.cu_seqlens_q)
    # preprocess has no mask. Its inputs come from causal attention, in which some rows may see no key.
    causal = KernelSpec("dqdr", spec.head_dim, spec.dtype, causal=True, varlen=spec.varlen)
    result = attend(spec if "row_stats" in read else causal, inputs)
    if "row_stats" in read:
        inputs.row_stats = expected_row_stats(spec, inputs, result).float()
    else:
        inputs.out, inputs.v_mean = (x.to(inputs.q.dtype) for x in (result.out, result.v_mean))
        inputs.lse, inputs.t_mean = result.lse.float(), result.t_mean.float()
    return inputs, result


def _lengths(longest: int, batch: int, seed: int, full: bool) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (batch,), generator=draw, dtype=torch.int32)
    is_short = torch.rand(batch, generator=draw) < 0.5  # shorter than a block of keys
    lengths = torch.where(is_short, lengths % 32, lengths)
    lengths[seed % batch] = longest * (seed % 2)  # 0 and the full length occur often
    if full:
        lengths.fill_(longest)
    return lengths


def _page(inputs: Inputs, page_size: int, seed: int) -> None:
    """Split the caches into pages, shuffled among unused pages. Table entries for no keys are out of range."""
    assert inputs.cache_seqlens is not None
    batch, seqlen, device = *inputs.k.shape[:2], inputs.k.device
    pages = -(-seqlen // page_size)
    page_numbers = torch.randperm(batch * pages + 2, generator=torch.Generator().manual_seed(seed)).to(device)
    page_numbers = page_numbers[: batch * pages]

    def paged(x: Tensor) -> Tensor:
        result, padded = _full_of_poison(x, batch * pages + 2, page_size), x
        if seqlen % page_size:
            padded = _full_of_poison(x, batch, pages * page_size)
            padded[:, :seqlen] = x
        result[page_numbers] = padded.view(batch * pages, page_size, *x.shape[2:])
        return result

    inputs.k = paged(inputs.k)  # one at a time, so that there are never three copies of a large cache
    inputs.v = paged(inputs.v)
    unused = torch.arange(pages, device=device) * page_size >= inputs.cache_seqlens[:, None]
    table = page_numbers.view(batch, pages).to(torch.int32)
    if inputs.cache_leftpad is not None:
        unused |= (torch.arange(1, pages + 1, device=device) * page_size) <= inputs.cache_leftpad[:, None]
    inputs.page_table = table.masked_fill(unused, 2**30)


def _poison(x: Tensor, mask: Tensor) -> None:
    if x.element_size() > 1:
        x[mask] = POISON
    else:
        x.view(torch.uint8)[mask] = 0x7F  # NaN in e4m3 and e5m2


def _full_of_poison(like: Tensor, *size: int) -> Tensor:
    result = torch.zeros((*size, *like.shape[2:]), dtype=like.dtype, device=like.device)
    _poison(result, torch.ones(size, dtype=torch.bool, device=like.device))
    return result


def _pack(inputs: Inputs, shape: Shape, seed: int, full: bool) -> None:
    """Pack the sequences of the batch, each cut to its own length; in decode only the queries.

    Unless `full`, some rows before the first and after the last sequence belong to no sequence and hold NaN.
    """
    lengths_q = _lengths(shape.seqlen_q, shape.batch, seed, full)
    if inputs.cache_seqlens is not None:  # cache_seqlens has the numbers of keys
        lengths_k = torch.zeros_like(lengths_q)
    else:
        lengths_k = _lengths(shape.seqlen_kv, shape.batch, seed + 7, full)

    before, after = (0, 0) if full else (seed % 3, seed % 5 * 7)

    def packed(x: Tensor, lengths: Tensor) -> Tensor:
        rows = [x[b, :length] for b, length in enumerate(lengths.tolist())]
        padding = x.new_full((before + after, *x.shape[2:]), POISON)
        return torch.cat([padding[:before], *rows, padding[before:]])

    def ends(lengths: Tensor) -> Tensor:
        result = torch.full((shape.batch + 1,), before, dtype=torch.int32)
        result[1:] += lengths.cumsum(0)
        return result.to(inputs.q.device)

    inputs.q, inputs.r = packed(inputs.q, lengths_q), packed(inputs.r, lengths_q)
    inputs.cu_seqlens_q = ends(lengths_q)
    inputs.max_seqlen_q, inputs.max_seqlen_k = shape.seqlen_q, shape.seqlen_kv
    if inputs.cache_seqlens is None:
        inputs.k, inputs.v = packed(inputs.k, lengths_k), packed(inputs.v, lengths_k)
        inputs.cu_seqlens_k = ends(lengths_k)


def _poison_padding(x: Tensor, cu_seqlens: Tensor) -> None:
    """Fill the rows of a packed tensor that belong to no sequence with NaN."""
    x[: cu_seqlens[0]] = POISON
    x[cu_seqlens[-1] :] = POISON


def attend(spec: KernelSpec, x: Inputs) -> Reference:
    """The forward of these inputs under the spec's mask, in float64."""
    options, tensors = oracle_options(spec, x), (x.q, x.r, x.k, x.v)
    if op_of(spec).kind is OpKind.CACHE:
        return reference_cached_forward(
            *tensors,
            cache_seqlens=x.cache_seqlens,
            cache_leftpad=x.cache_leftpad,
            page_table=x.page_table,
            cu_seqlens_q=x.cu_seqlens_q,
            k_scale=x.k_scale,
            v_scale=x.v_scale,
            **options,
        )
    if spec.varlen:
        assert x.cu_seqlens_q is not None
        assert x.cu_seqlens_k is not None
        cu_seqlens = (x.cu_seqlens_q, x.cu_seqlens_k)
        return reference_varlen_forward(*tensors, *cu_seqlens, **options)
    return reference_forward(*tensors, **options)


def oracle_options(spec: KernelSpec, x: Inputs) -> dict[str, Any]:
    """The options of the reference functions for these inputs."""
    return {
        "causal": spec.causal,
        "window_size": x.window_size if spec.window else None,
        "softmax_scale": softmax_scale(spec),
        "softcap": x.softcap if spec.softcap else None,
    }


def expected_row_stats(spec: KernelSpec, x: Inputs, forward: Reference) -> Tensor:
    """The expected output of preprocess, in float64: see `abi.empty_row_stats`. NaN in unused rows."""
    assert x.do is not None
    scale = softmax_scale(spec)
    do, out, v_mean = x.do.double(), forward.out.double(), forward.v_mean.double()
    dp_mean = (do * v_mean).sum(-1).transpose(-1, -2)
    dp_mean_minus_delta = (do * (v_mean - out)).sum(-1).transpose(-1, -2)
    lse = forward.lse.double() / math.log(2)
    lse2, w_bias = torch.where(lse == -math.inf, math.inf, lse), scale * (1 + forward.t_mean.double())
    result = torch.stack([lse2, w_bias, dp_mean, scale * dp_mean_minus_delta])
    ends = [0, result.shape[-1]] if x.cu_seqlens_q is None else x.cu_seqlens_q.tolist()
    row_stats = empty_row_stats(forward.lse, 0 if x.cu_seqlens_q is None else len(ends) - 1).double().fill_(math.nan)
    for sequence, (start, end) in enumerate(itertools.pairwise(ends)):
        first = (start + sequence * PADDED_TO) // PADDED_TO * PADDED_TO
        padded = -(-(end - start) // PADDED_TO) * PADDED_TO
        padding = torch.tensor([math.inf, scale, 0.0, 0.0], dtype=torch.float64, device=row_stats.device)
        row_stats[..., first : first + padded] = padding.view(4, *[1] * (row_stats.dim() - 1))
        row_stats[..., first : first + end - start] = result[..., start:end]
    return row_stats


def softmax_scale(spec: KernelSpec) -> float:
    return default_scale(spec.head_dim)
