"""The baselines' inputs, and the errors of their results against the fp64 oracle, over all results or a sample.

Sequences and kv heads are independent, so a few of them, with their query heads, show a kernel's error. The oracle
computes them one by one in float64, so thousands of them would take longer than all timing. The sample is the first
and the last sequence and kv head, where offsets are smallest and largest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallax_gen.codegen.abi import Inputs
from parallax_gen.oracle.accuracy import errors, gradient_term_sizes
from parallax_gen.oracle.inputs import random_inputs_of
from parallax_gen.oracle.peaked import Kind
from parallax_gen.oracle.verify import Expected, oracle
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import TRAINING

KV_GRADIENTS = ("dk", "dv")
# The factor of q in peaked inputs: then one key has most of a query's weight even among 65536 keys at head_dim 64.
_PEAKED_Q_FACTOR = 2.0


@dataclass(frozen=True)
class Sample:
    """The sequences and kv heads to compare; None for all. Of packed sequences all are compared."""

    sequences: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None

    @classmethod
    def first_and_last(cls, spec: KernelSpec, shape: Shape) -> Sample:
        sequences, heads = (tuple(sorted({0, count - 1})) for count in (shape.batch, shape.kv_heads))
        return cls(None if spec.varlen else sequences, heads)

    def pairs(self, shape: Shape) -> int:
        """The number of (sequence, kv head) pairs that are compared."""
        sequences = shape.batch if self.sequences is None else len(self.sequences)
        return sequences * (shape.kv_heads if self.kv_heads is None else len(self.kv_heads))

    def queries(self, x: Tensor, group: int) -> Tensor:
        """The sample of a tensor with query heads, (batch, seqlen, heads, head_dim), or packed without a batch."""
        heads = None if self.kv_heads is None else [h * group + i for h in self.kv_heads for i in range(group)]
        return _select(_select(x, 0, self.sequences), -2, heads)

    def keys(self, x: Tensor, *, paged: bool = False) -> Tensor:
        """The sample of a tensor with kv heads; all pages of a paged cache, which sequences share."""
        return _select(_select(x, 0, None if paged else self.sequences), -2, self.kv_heads)

    def of(self, spec: KernelSpec, x: Inputs) -> Inputs:
        """The sample of a call's inputs: the inputs of a smaller call."""
        paged = spec.page_size > 0
        sample = replace(x, q=self.queries(x.q, spec.group), r=self.queries(x.r, spec.group))
        sample.k, sample.v = self.keys(x.k, paged=paged), self.keys(x.v, paged=paged)
        for name in ("cache_seqlens", "page_table", "cache_leftpad"):
            tensor = getattr(x, name)
            setattr(sample, name, None if tensor is None else _select(tensor, 0, self.sequences))
        for name in ("k_scale", "v_scale"):
            scale = getattr(x, name)
            if scale is not None and scale.numel() > 1:  # one scale per kv head
                setattr(sample, name, _select(scale, 0, self.kv_heads))
        sample.do = None if x.do is None else self.queries(x.do, spec.group)
        return sample


def _select(x: Tensor, dim: int, indices: Sequence[int] | None) -> Tensor:
    return x if indices is None else x.index_select(dim, torch.tensor(indices, device=x.device))


def random_inputs_for_case(
    op: str, spec: KernelSpec, shape: Shape, device: str, lengths: Sequence[int] = (), kind: Kind = "normal"
) -> Inputs:
    """Fresh random inputs; for a training step with the output's gradient. lengths: see Row. kind: see `peaked`.

    Keys beyond a sequence's length hold finite values, as in real use: a baseline may multiply them by 0.
    """
    inputs = random_inputs_of(spec, shape, seed=random.randrange(2**31), device=device, full=True, kind=kind)
    if lengths:
        inputs.cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    if op == TRAINING:
        # Not the device's default generator: a baseline's failed graph capture leaves that one unusable.
        generator = torch.Generator(device).manual_seed(random.randrange(2**31))
        inputs.do = torch.randn(inputs.q.shape, dtype=inputs.q.dtype, device=device, generator=generator)
    return inputs


def peaked_inputs(op: str, spec: KernelSpec, shape: Shape, device: str, lengths: Sequence[int] = ()) -> Inputs:
    """Fresh random inputs whose rows give most of their weight to one key that they see.

    It is neither the first key nor a row's own, whose scores some of our kernels take as the reference of their
    exponentials: those would be exact there by their choice. It is the one at a tenth of the shortest sequence. Under a
    window it is half a window before each row's own, on the diagonal of the shape: in a cache only sequences with all
    keys have such rows.
    """
    fewest = min((length for length in lengths if length > 1), default=shape.seqlen_kv)
    kind = -1 - min(shape.window, shape.seqlen_kv) // 2 if spec.window else max(1, fewest // 10)
    inputs = random_inputs_for_case(op, spec, shape, device, lengths, kind)
    inputs.q *= _PEAKED_Q_FACTOR
    return inputs


class OracleCheck:
    """The oracle's results on given inputs, compared with a baseline's. spec: of the forward or the decode."""

    def __init__(self, op: str, spec: KernelSpec, shape: Shape, inputs: Inputs, extent: str):
        """extent: "whole", "sample" or "none": see rows.Effort."""
        self._spec = spec
        self._sample = Sample.first_and_last(spec, shape) if extent == "sample" else Sample()
        self.pairs = 0 if extent == "none" else self._sample.pairs(shape)  # that are compared
        self._expected: Expected = {}
        self._term_sizes: dict[str, float] = {}
        if extent == "none":
            return
        x = self._sample.of(spec, inputs)
        self._expected = {"out": oracle(spec, x)["out"]}
        if op == TRAINING:
            assert x.do is not None
            self._expected |= oracle(spec.for_op("dqdr"), x) | oracle(spec.for_op("dkdv"), x)
            sizes = gradient_term_sizes(x.q, x.r, x.k, x.v, x.do)
            self._term_sizes = {name: float(size) for name, size in sizes._asdict().items()}

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """The relative error of each result by name; empty with extent "none"."""
        return {
            name: errors(self._sampled(name, results[name]), expected, self._term_sizes.get(name)).relative
            for name, expected in self._expected.items()
            if name in results
        }

    def _sampled(self, name: str, result: Tensor) -> Tensor:
        sample = self._sample
        return sample.keys(result) if name in KV_GRADIENTS else sample.queries(result, self._spec.group)
