"""What a baseline is: one implementation, with its forward, its decode and its training step where it has them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

from parallax_gen.ops.base import op_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import TRAINING

if TYPE_CHECKING:
    from torch import Tensor

    from parallax_gen.codegen.abi import Inputs

Call = Callable[[], "Tensor"]  # -> like q

NO_LENGTHS = "it has no lengths a sequence"
CALLS_A_CONFIG = 3  # of Triton's autotuners, in haste


class Prepared(Protocol):
    """What can be timed on given inputs, by name, and what it all gives, by name and laid out as the inputs are."""

    @property
    def parts(self) -> dict[str, Callable[[], object]]: ...

    def results(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Single:
    """One function with one output."""

    op: str
    call: Call

    @property
    def parts(self) -> dict[str, Callable[[], object]]:
        return {self.op: self.call}

    def results(self) -> dict[str, Tensor]:
        return {"out": self.call()}


@dataclass
class Step:
    """A training step in an implementation's own layout: the forward and its gradients.

    attend   the output, with what its gradients need
    inputs   that have gradients: q, r, k, v; q, k, v of softmax
    do       the output's gradient
    restore  brings an output or a gradient into the layout of `Inputs`
    """

    attend: Call
    inputs: tuple[Tensor, ...]
    do: Tensor
    restore: Callable[[Tensor], Tensor] = lambda x: x
    _before: tuple[object, Tensor] | None = field(default=None, init=False)

    @property
    def parts(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        return {"forward": self.attend, "backward": self.backward, "step": self.whole}

    def backward(self) -> tuple[Tensor, ...]:
        """The gradients, of a forward that ran before: on this stream, for autograd runs a backward where that ran."""
        import torch

        stream = torch.cuda.current_stream() if self.do.is_cuda else None
        if self._before is None or self._before[0] != stream:
            self._before = (stream, self.attend())
        return torch.autograd.grad(self._before[1], self.inputs, self.do, retain_graph=True)

    def whole(self) -> tuple[Tensor, ...]:
        import torch

        return torch.autograd.grad(self.attend(), self.inputs, self.do)

    def results(self) -> dict[str, Tensor]:
        """The output and the gradients by name, once through."""
        import torch

        out = self.attend()
        grads = torch.autograd.grad(out, self.inputs, self.do)
        names = ("dq", "dr", "dk", "dv") if len(grads) == 4 else ("dq", "dk", "dv")
        found = {"out": out.detach(), **dict(zip(names, grads, strict=True))}
        return {name: self.restore(x) for name, x in found.items()}


@dataclass(frozen=True)
class Baseline:
    """One implementation, and what it has: None where it has no such kernel.

    forward, decode, step  on given inputs; they raise ImportError where it is not installed, NotImplementedError where
                           it has no kernel of the spec, and anything where it cannot
    softmax                plain softmax attention: less work than Parallax, so no error to compare
    packages               the distributions it comes from, of torch's and our own none
    setting                what else its time depends on, in words
    release                lets go of the tensors of a comparison that is over, where it keeps them
    """

    name: str
    forward: Callable[[KernelSpec, Inputs], Call] | None = None
    decode: Callable[[KernelSpec, Inputs], Call] | None = None
    step: Callable[[KernelSpec, Inputs], Step] | None = None
    softmax: bool = False
    packages: tuple[str, ...] = ()
    setting: Callable[[], str] = lambda: ""
    release: Callable[[], None] = lambda: None

    def has(self, op: str) -> bool:
        """Whether it has a kernel of "forward", "decode" or TRAINING."""
        return (self.step if op == TRAINING else self._function(op)) is not None

    def prepare(self, op: str, spec: KernelSpec, x: Inputs) -> Prepared:
        """What can be timed of an op that it has. Raises what its function raises."""
        if op == TRAINING:
            assert self.step is not None
            return self.step(spec, x)
        function = self._function(op)
        assert function is not None
        return Single(op, function(spec, x))

    def package(self) -> str:
        """`parallax-kernel 0.1.1, helion 1.2.0, HELION_AUTOTUNE_EFFORT=none`; without what is not installed."""
        found = []
        for name in self.packages:
            with suppress(metadata.PackageNotFoundError):
                found.append(f"{name} {metadata.version(name)}")
        return ", ".join([*found, *filter(None, [self.setting()])])

    def _function(self, op: str) -> Callable[[KernelSpec, Inputs], Call] | None:
        return {"forward": self.forward, "decode": self.decode}[op]


def check_lacking(spec: KernelSpec, *, lengths: str = "", **lacking: str) -> None:
    """Raise NotImplementedError if the spec has a flag on that is lacking; of each flag, what is said then.

    lengths  what is said where sequences of their own lengths are lacking
    """
    if lengths and op_of(spec).own_lengths:
        raise NotImplementedError(lengths)
    for flag, told in lacking.items():
        if getattr(spec, flag):
            raise NotImplementedError(told)


def check_dense_causal(spec: KernelSpec) -> None:
    """What other Parallax kernels for training are compared at. Raises NotImplementedError."""
    if not spec.causal:
        raise NotImplementedError("it is causal only")
    check_lacking(spec, varlen="its packed sequences are not compared")


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory, as tensors that have gradients."""
    return tuple(t.detach().requires_grad_() for t in tensors)


def gradient_of_output(x: Inputs) -> Tensor:
    """Of a training step's inputs."""
    assert x.do is not None
    return x.do


@contextmanager
def hasty_autotuners() -> Iterator[None]:
    """In here Triton's autotuners try each config with a few calls, not for an eighth of a second."""
    from triton.runtime.autotuner import Autotuner

    before = vars(Autotuner)["do_bench"]
    Autotuner.do_bench = property(lambda self: _few_calls)
    try:
        yield
    finally:
        Autotuner.do_bench = before


def _few_calls(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    """Milliseconds: the median, for every quantile that is asked for."""
    from parallax_gen.tuning.workers.measure import event_times_us

    call()
    times = [us for _ in range(CALLS_A_CONFIG) for us in event_times_us(call, 1)]
    return [statistics.median(times) / 1000] * len(quantiles)
