"""Checks a kernel against the fp64 oracle: on fresh random inputs, with every output poisoned first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from parallax_gen.codegen.abi import Call, Inputs, prepare
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import KernelSource
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.oracle.accuracy import errors, gradient_sizes, why_wrong
from parallax_gen.oracle.inputs import POISON, attend, inputs_and_forward, random_inputs_of, rows_of, softmax_scale
from parallax_gen.oracle.reference import Gradients, Reference, reference_backward, reference_varlen_backward
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

FEW_KEYS = 16  # a query that sees fewer has gradients of which little is left but rounding

# What a launch must write, by name, in float64.
Expected = dict[str, Tensor]


def oracle(spec: KernelSpec, x: Inputs) -> Expected:
    """What a launch on these inputs must write."""
    written = op_of(spec).written(spec)
    if "rows" in written:
        assert x.out is not None
        assert x.lse is not None
        assert x.t_mean is not None
        assert x.v_mean is not None
        return {"rows": rows_of(spec, x, Reference(x.out, x.lse, x.t_mean, x.v_mean))}
    return _written_of(spec, attend(spec, x) if "out" in written else _gradients(spec, x))


class TrainingStep:
    """The same inputs for the forward, dkdv and dqdr, and what each must write: the oracle runs once for the three.

    All sequences are as long as the shape's.
    """

    def __init__(self, spec: KernelSpec, shape: Shape, *, seed: int, device: str):
        """spec: `job.step_spec` one of its kernels."""
        self._spec = spec
        self.inputs, self._forward = inputs_and_forward(spec, shape, seed=seed, device=device, full=True)

    def expected(self, spec: KernelSpec) -> Expected:
        """What a launch of one of the step's kernels must write."""
        if "out" in op_of(spec).written(spec):
            assert self._forward is not None
            return _written_of(spec, self._forward)
        return _written_of(spec, self._both_gradients)

    @cached_property
    def _both_gradients(self) -> Gradients:
        return _gradients(self._spec, self.inputs)


def _written_of(spec: KernelSpec, found: Reference | Gradients) -> Expected:
    return {name: getattr(found, name) for name in op_of(spec).written(spec)}


def _gradients(spec: KernelSpec, x: Inputs) -> Gradients:
    """Of the inputs of dkdv or dqdr under the spec's mask, in float64."""
    assert x.do is not None
    scale, window = softmax_scale(spec), x.window_size if spec.window else None
    given = (x.q, x.r, x.k, x.v, x.do)
    if spec.varlen:
        assert x.cu_seqlens_q is not None
        assert x.cu_seqlens_k is not None
        ends = (x.cu_seqlens_q, x.cu_seqlens_k)
        return reference_varlen_backward(*given, *ends, causal=spec.causal, window_size=window, softmax_scale=scale)
    return reference_backward(*given, causal=spec.causal, window_size=window, softmax_scale=scale)


def poisoned(spec: KernelSpec, config: KernelConfig, inputs: Inputs) -> Call:
    """The call on these inputs with all that a launch is to write overwritten: nothing right is left from before."""
    call = prepare(spec, config, inputs)
    for tensor in (*call.written.values(), *call.scratch[:1]):  # the counters, second, count from 0
        tensor.fill_(POISON)
    return call


@dataclass(frozen=True)
class Verdict:
    """The largest relative error of what was written, and what is wrong in a sentence, None where nothing is."""

    error: float
    wrong: str | None


def run(source: KernelSource, spec: KernelSpec, config: KernelConfig, inputs: Inputs, expected: Expected) -> Verdict:
    """Launch once on these inputs and judge all that it wrote."""
    call = poisoned(spec, config, inputs)
    load(source).launch(*call.arguments(softmax_scale(spec)))
    return judge(call, expected)


def judge(call: Call, expected: Expected) -> Verdict:
    """What a launched call wrote, against what it was to write."""
    x, found, reasons = call.inputs, 0.0, []
    sizes = natural_sizes(call.spec, x)._asdict() if set(Gradients._fields) & set(call.written) else {}
    of_rows = "rows" in call.written
    for name, (out, ref) in _compared(call.written, expected).items():
        dtype = "fp32" if of_rows else call.spec.dtype  # fp32 sums of products
        if not of_rows:
            (out, padding), (ref, ref_padding) = (of_sequences(x, name, t) for t in (out, ref))
            if not torch.equal(padding.double(), ref_padding):
                reasons.append(f"{name}: not {ref_padding.flatten()[0].item()} in rows that no sequence has")
        if why := why_wrong(out, ref, dtype, sizes.get(name)):
            reasons.append(f"{name}: {why}")
        if name == "out" or op_of(call.spec).stats_in_error:
            found = max(found, errors(out, ref, sizes.get(name)).relative)
    if len(call.scratch) == 2 and bool(call.scratch[1].any()):
        reasons.append("its counters are not back at 0 for the next launch")
    return Verdict(found, "; ".join(reasons) or None)


def of_sequences(x: Inputs, name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Of what a launch writes the rows that sequences have, and those that none has: none but of packed sequences."""
    ends = x.cu_seqlens_k if name in ("dk", "dv") else x.cu_seqlens_q
    if ends is None:
        return tensor, tensor[:0]
    begin, end = int(ends[0]), int(ends[-1])
    if tensor.dim() == 3:
        return tensor[begin:end], torch.cat([tensor[:begin], tensor[end:]])
    return tensor[:, begin:end], torch.cat([tensor[:, :begin], tensor[:, end:]], dim=1)


def natural_sizes(spec: KernelSpec, x: Inputs) -> Gradients:
    """`gradient_sizes` of the rows that sequences have: of dq and dr as (rows, 1), of dk and dv as (1, 1).

    Where queries see few keys nearly all of a gradient cancels, and what is left is rounding: of the output in T =
    do·o, off by |t| roundings, and of tf32's a, which nothing else rounds alike. The largest rows have |t| of 4 and
    do·v of 3 times its mean: 12 of a gradient's natural size. And a key's gradients add up those of all its queries.
    """
    assert x.do is not None
    rows, keys = (
        slice(None) if ends is None else slice(int(ends[0]), int(ends[-1])) for ends in (x.cu_seqlens_q, x.cu_seqlens_k)
    )
    sizes = gradient_sizes(x.q[rows], x.r[rows], x.k[keys], x.v[keys], x.do[rows])
    few = (_keys_seen(spec, x) < FEW_KEYS).to(x.q.device)
    of_query = torch.where(few, 12.0, 1.0)[:, None]
    of_key = torch.ones(1, 1, device=x.q.device)
    if few.numel() and few.all():
        queries = x.q[rows].shape[-3] * spec.group / max(1, x.k[keys].shape[-3])
        of_key *= 12 * max(1.0, queries) ** 0.5
    return Gradients(dq=of_query * sizes.dq, dr=of_query * sizes.dr, dk=of_key * sizes.dk, dv=of_key * sizes.dv)


def _keys_seen(spec: KernelSpec, x: Inputs) -> Tensor:
    """How many keys each query sees: (total_q,), or (seqlen_q,) of every sequence."""
    if x.cu_seqlens_q is not None and x.cu_seqlens_k is not None:
        lengths = list(zip(x.cu_seqlens_q.diff().tolist(), x.cu_seqlens_k.diff().tolist(), strict=True))
    else:
        lengths = [(x.q.shape[1], x.k.shape[1])]
    seen = []
    for queries, keys in lengths:
        most = x.window_size if spec.window else keys
        last = torch.arange(queries) + keys - queries + 1 if spec.causal else torch.full((queries,), keys)
        seen.append(last.clamp(0, most))
    return torch.cat(seen)


def _compared(written: dict[str, Tensor], expected: Expected) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs to compare. A row without keys has lse -inf on both sides: sums are compared, not their logarithms."""
    if "rows" in written:
        names = ("log2(e) lse", "scale (1 + t_mean)", "b", "scale (b - T)")
        there = ~expected["rows"].isnan().reshape(-1, expected["rows"].shape[-1]).any(0)
        rows, ref_rows = (x["rows"][..., there] for x in (written, expected))
        return dict(zip(names, zip(rows, ref_rows, strict=True), strict=True))
    pairs = {name: (tensor, expected[name]) for name, tensor in written.items()}
    if "lse" in pairs:
        out, ref = pairs.pop("lse")
        pairs["exp(lse)"] = (out.exp(), ref.exp())
    return pairs


def check(
    source: KernelSource, spec: KernelSpec, config: KernelConfig, shape: Shape, *, seed: int, device: str
) -> Verdict:
    """`run` on fresh random inputs of a shape."""
    inputs = random_inputs_of(spec, shape, seed=seed, device=device)
    return run(source, spec, config, inputs, oracle(spec, inputs))
