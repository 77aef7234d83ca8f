"""What baselines are given, and what the fp64 oracle expects of them: of everything, or of a sample.

Sequences and kv heads do not know of each other: a few, with the query heads that belong to them, tell how far off a
kernel is. The oracle takes them one by one in float64, which for thousands of them takes longer than all timing. The
sample is of the first and the last: where offsets are largest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallax_gen.codegen.abi import Inputs
from parallax_gen.oracle.accuracy import errors, gradient_sizes
from parallax_gen.oracle.inputs import random_inputs_of
from parallax_gen.oracle.verify import Expected, oracle
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import TRAINING

OF_KEYS = ("dk", "dv")


@dataclass(frozen=True)
class Sample:
    """Which sequences and kv heads are compared; None for all of them. Of packed sequences all are."""

    sequences: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None

    @classmethod
    def of_ends(cls, spec: KernelSpec, shape: Shape) -> Sample:
        sequences, heads = (tuple(sorted({0, count - 1})) for count in (shape.batch, shape.kv_heads))
        return cls(None if spec.varlen else sequences, heads)

    def rows(self, shape: Shape) -> int:
        """Pairs of a sequence and a kv head that are compared."""
        sequences = shape.batch if self.sequences is None else len(self.sequences)
        return sequences * (shape.kv_heads if self.kv_heads is None else len(self.kv_heads))

    def queries(self, x: Tensor, group: int) -> Tensor:
        """Its part of a tensor with query heads, (batch, seqlen, heads, head_dim), or packed without a batch."""
        heads = None if self.kv_heads is None else [h * group + i for h in self.kv_heads for i in range(group)]
        return _take(_take(x, 0, self.sequences), -2, heads)

    def keys(self, x: Tensor, *, paged: bool = False) -> Tensor:
        """Its part of a tensor with kv heads; all pages, where sequences share them."""
        return _take(_take(x, 0, None if paged else self.sequences), -2, self.kv_heads)

    def of(self, spec: KernelSpec, x: Inputs) -> Inputs:
        """Its part of a call's inputs, which is a call of its own."""
        paged = spec.page_size > 0
        found = replace(x, q=self.queries(x.q, spec.group), r=self.queries(x.r, spec.group))
        found.k, found.v = self.keys(x.k, paged=paged), self.keys(x.v, paged=paged)
        for name in ("cache_seqlens", "page_table", "cache_leftpad"):
            tensor = getattr(x, name)
            setattr(found, name, None if tensor is None else _take(tensor, 0, self.sequences))
        for name in ("k_scale", "v_scale"):
            scale = getattr(x, name)
            if scale is not None and scale.numel() > 1:  # one for each kv head
                setattr(found, name, _take(scale, 0, self.kv_heads))
        found.do = None if x.do is None else self.queries(x.do, spec.group)
        return found


def _take(x: Tensor, dim: int, indices: Sequence[int] | None) -> Tensor:
    return x if indices is None else x.index_select(dim, torch.tensor(indices, device=x.device))


def random_case(op: str, spec: KernelSpec, shape: Shape, device: str, lengths: Sequence[int] = ()) -> Inputs:
    """Fresh random inputs; of a training step with the output's gradient. lengths: as of Row.

    Behind a sequence's length lie numbers like those before it: a peer may multiply them by 0, as it may in use.
    """
    inputs = random_inputs_of(spec, shape, seed=random.randrange(2**31), device=device, full=True)
    if lengths:
        inputs.cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    if op == TRAINING:
        # Not of the device's own generator: where a graph failed to capture a peer, that is left unusable.
        generator = torch.Generator(device).manual_seed(random.randrange(2**31))
        inputs.do = torch.randn(inputs.q.shape, dtype=inputs.q.dtype, device=device, generator=generator)
    return inputs


class Judge:
    """The oracle's results on inputs, to compare a baseline's with. spec: the forward's or the decode's."""

    def __init__(self, op: str, spec: KernelSpec, shape: Shape, inputs: Inputs, extent: str):
        """extent: "whole", "sample" or "none", as of rows.Effort."""
        self._spec = spec
        self._sample = Sample.of_ends(spec, shape) if extent == "sample" else Sample()
        self.rows = 0 if extent == "none" else self._sample.rows(shape)
        self._expected: Expected = {}
        self._sizes: dict[str, float] = {}
        if extent == "none":
            return
        x = self._sample.of(spec, inputs)
        self._expected = {"out": oracle(spec, x)["out"]}
        if op == TRAINING:
            assert x.do is not None
            self._expected |= oracle(spec.of("dqdr"), x) | oracle(spec.of("dkdv"), x)
            sizes = gradient_sizes(x.q, x.r, x.k, x.v, x.do)
            self._sizes = {name: float(size) for name, size in sizes._asdict().items()}

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """Of each result the relative error, by name; nothing where none was asked for."""
        return {
            name: errors(self._part(name, results[name]), expected, self._sizes.get(name)).relative
            for name, expected in self._expected.items()
            if name in results
        }

    def _part(self, name: str, found: Tensor) -> Tensor:
        sample = self._sample
        return sample.keys(found) if name in OF_KEYS else sample.queries(found, self._spec.group)
