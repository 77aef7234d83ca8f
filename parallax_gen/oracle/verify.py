"""Checks a kernel against the fp64 oracle, on new random inputs. Every output is first filled with NaN."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from parallax_gen.codegen.abi import Call, Inputs, prepare
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import KernelSource
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.oracle.accuracy import errors, gradient_term_sizes, why_wrong
from parallax_gen.oracle.inputs import (
    POISON,
    attend,
    expected_row_stats,
    inputs_and_forward,
    oracle_options,
    random_inputs_of,
    softmax_scale,
)
from parallax_gen.oracle.reference import Gradients, Reference, reference_backward, reference_varlen_backward
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

FEW_KEYS = 16  # the gradients of a query that sees fewer keys are mostly rounding errors

# The expected outputs of a launch, by name, in float64.
Expected = dict[str, Tensor]


def oracle(spec: KernelSpec, x: Inputs) -> Expected:
    """The expected outputs of a launch on these inputs."""
    written = op_of(spec).written(spec)
    if "row_stats" in written:
        assert x.out is not None
        assert x.lse is not None
        assert x.t_mean is not None
        assert x.v_mean is not None
        return {"row_stats": expected_row_stats(spec, x, Reference(x.out, x.lse, x.t_mean, x.v_mean))}
    return _written_of(spec, attend(spec, x) if "out" in written else _gradients(spec, x))


class TrainingStep:
    """Shared inputs of the forward, dkdv and dqdr, and their expected outputs: the oracle runs once for all three.

    All sequences have the shape's length.
    """

    def __init__(self, spec: KernelSpec, shape: Shape, *, seed: int, device: str):
        """spec: `job.step_spec` of one of the step's kernels."""
        self._spec = spec
        self.inputs, self._forward = inputs_and_forward(spec, shape, seed=seed, device=device, full=True)

    def expected(self, spec: KernelSpec) -> Expected:
        """The expected outputs of one of the step's kernels."""
        if "out" in op_of(spec).written(spec):
            assert self._forward is not None
            return _written_of(spec, self._forward)
        return _written_of(spec, self._both_gradients)

    @cached_property
    def _both_gradients(self) -> Gradients:
        return _gradients(self._spec, self.inputs)


def _written_of(spec: KernelSpec, reference: Reference | Gradients) -> Expected:
    return {name: getattr(reference, name) for name in op_of(spec).written(spec)}


def _gradients(spec: KernelSpec, x: Inputs) -> Gradients:
    """The gradients for the inputs of dkdv or dqdr under the spec's mask, in float64."""
    assert x.do is not None
    options, tensors = oracle_options(spec, x), (x.q, x.r, x.k, x.v, x.do)
    if spec.varlen:
        assert x.cu_seqlens_q is not None
        assert x.cu_seqlens_k is not None
        cu_seqlens = (x.cu_seqlens_q, x.cu_seqlens_k)
        return reference_varlen_backward(*tensors, *cu_seqlens, **options)
    return reference_backward(*tensors, **options)


def poisoned_call(spec: KernelSpec, config: KernelConfig, inputs: Inputs) -> Call:
    """The call on these inputs, with all outputs and scratch filled with NaN so that no earlier result remains."""
    call = prepare(spec, config, inputs)
    for tensor in (*call.written.values(), *call.scratch[:1]):  # without the arrival counters, which must start at 0
        tensor.fill_(POISON)
    return call


@dataclass(frozen=True)
class Verdict:
    """The largest relative error of the outputs, and a sentence that says what is wrong, or None."""

    error: float
    wrong: str | None


def launch_and_check(
    source: KernelSource, spec: KernelSpec, config: KernelConfig, inputs: Inputs, expected: Expected
) -> Verdict:
    """Launch once on these inputs and check all outputs."""
    call = poisoned_call(spec, config, inputs)
    load(source).launch(*call.arguments(softmax_scale(spec)))
    return judge(call, expected)


def judge(call: Call, expected: Expected) -> Verdict:
    """Compare the outputs of a launched call with the expected ones."""
    x, error, reasons = call.inputs, 0.0, []
    sizes = term_sizes(call.spec, x)._asdict() if set(Gradients._fields) & set(call.written) else {}
    is_row_stats = "row_stats" in call.written
    for name, (out, ref) in _compared(call.written, expected).items():
        dtype = "fp32" if is_row_stats else call.spec.dtype  # fp32 sums of products
        if not is_row_stats:
            (out, padding), (ref, ref_padding) = (of_sequences(x, name, t) for t in (out, ref))
            if not torch.equal(padding.double(), ref_padding):
                reasons.append(f"{name}: not {ref_padding.flatten()[0].item()} in rows of no sequence")
        if reason := why_wrong(out, ref, dtype, sizes.get(name)):
            reasons.append(f"{name}: {reason}")
        if name == "out" or op_of(call.spec).stats_in_error:
            error = max(error, errors(out, ref, sizes.get(name)).relative)
    if len(call.scratch) == 2 and bool(call.scratch[1].any()):
        reasons.append("the launch left arrival counters that are not 0")
    return Verdict(error, "; ".join(reasons) or None)


def of_sequences(x: Inputs, name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of an output that belong to sequences, and the others, which only packed sequences have."""
    ends = x.cu_seqlens_k if name in ("dk", "dv") else x.cu_seqlens_q
    if ends is None:
        return tensor, tensor[:0]
    begin, end = int(ends[0]), int(ends[-1])
    if tensor.dim() == 3:
        return tensor[begin:end], torch.cat([tensor[:begin], tensor[end:]])
    return tensor[:, begin:end], torch.cat([tensor[:, :begin], tensor[:, end:]], dim=1)


def term_sizes(spec: KernelSpec, x: Inputs) -> Gradients:
    """`gradient_term_sizes` of the rows that belong to sequences: (rows, 1) for dq and dr, (1, 1) for dk and dv.

    If queries see few keys, nearly all terms of a gradient cancel, and rounding errors remain: those of the output, of
    up to |t| roundings, in delta = do·o; and in tf32 those of dp, which no other term shares. The largest rows have |t|
    of 4 and do·v of 3 times its mean: an error of 12 times a gradient's natural size. A key's gradients sum the errors
    of all its queries.
    """
    assert x.do is not None
    rows, keys = (
        slice(None) if ends is None else slice(int(ends[0]), int(ends[-1])) for ends in (x.cu_seqlens_q, x.cu_seqlens_k)
    )
    sizes = gradient_term_sizes(x.q[rows], x.r[rows], x.k[keys], x.v[keys], x.do[rows])
    sees_few = (_keys_seen(spec, x) < FEW_KEYS).to(x.q.device)
    query_factor = torch.where(sees_few, 12.0, 1.0)[:, None]
    key_factor = torch.ones(1, 1, device=x.q.device)
    if sees_few.numel() and sees_few.all():
        queries = x.q[rows].shape[-3] * spec.group / max(1, x.k[keys].shape[-3])
        key_factor *= 12 * max(1.0, queries) ** 0.5
    return Gradients(
        dq=query_factor * sizes.dq, dr=query_factor * sizes.dr, dk=key_factor * sizes.dk, dv=key_factor * sizes.dv
    )


def _keys_seen(spec: KernelSpec, x: Inputs) -> Tensor:
    """How many keys each query sees: (total_q,), or (seqlen_q,) of every sequence."""
    if x.cu_seqlens_q is not None and x.cu_seqlens_k is not None:
        lengths = list(zip(x.cu_seqlens_q.diff().tolist(), x.cu_seqlens_k.diff().tolist(), strict=True))
    else:
        lengths = [(x.q.shape[1], x.k.shape[1])]
    counts = []
    for queries, keys in lengths:
        max_keys = x.window_size if spec.window else keys
        last = torch.arange(queries) + keys - queries + 1 if spec.causal else torch.full((queries,), keys)
        counts.append(last.clamp(0, max_keys))
    return torch.cat(counts)


def _compared(written: dict[str, Tensor], expected: Expected) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs to compare. A row without keys has lse -inf on both sides, so exp(lse) is compared."""
    if "row_stats" in written:
        names = ("lse2", "w_bias", "dp_mean", "c")
        used = ~expected["row_stats"].isnan().reshape(-1, expected["row_stats"].shape[-1]).any(0)
        stats, ref_stats = (x["row_stats"][..., used] for x in (written, expected))
        return dict(zip(names, zip(stats, ref_stats, strict=True), strict=True))
    pairs = {name: (tensor, expected[name]) for name, tensor in written.items()}
    if "lse" in pairs:
        out, ref = pairs.pop("lse")
        pairs["exp(lse)"] = (out.exp(), ref.exp())
    return pairs


def check(
    source: KernelSource, spec: KernelSpec, config: KernelConfig, shape: Shape, *, seed: int, device: str
) -> Verdict:
    """`launch_and_check` on new random inputs of a shape."""
    inputs = random_inputs_of(spec, shape, seed=seed, device=device)
    return launch_and_check(source, spec, config, inputs, oracle(spec, inputs))
