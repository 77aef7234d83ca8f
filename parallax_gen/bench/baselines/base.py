"""A baseline: one implementation of attention, with whichever of forward, decode and training step it has."""

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

AttentionCall = Callable[[], "Tensor"]  # returns a tensor like q

NO_LENGTHS = "no per-sequence lengths"
CALLS_PER_CONFIG = 3  # timed by Triton's autotuners with Effort.few_calls


class Prepared(Protocol):
    """A baseline bound to inputs: its timed parts by name, and its results by name in the inputs' layout."""

    @property
    def parts(self) -> dict[str, Callable[[], object]]: ...

    def results(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class SingleOutput:
    """A forward or a decode bound to inputs: one call with one output."""

    op: str
    call: AttentionCall

    @property
    def parts(self) -> dict[str, Callable[[], object]]:
        return {self.op: self.call}

    def results(self) -> dict[str, Tensor]:
        return {"out": self.call()}


@dataclass
class Step:
    """A training step in an implementation's own layout: the forward and its gradients.

    attend   computes the output, through autograd
    inputs   the tensors that need gradients: q, r, k, v; for softmax q, k, v
    do       the output's gradient
    restore  converts an output or a gradient to the layout of `Inputs`
    """

    attend: AttentionCall
    inputs: tuple[Tensor, ...]
    do: Tensor
    restore: Callable[[Tensor], Tensor] = lambda x: x
    _last_forward: tuple[object, Tensor] | None = field(default=None, init=False)  # (stream, output)

    @property
    def parts(self) -> dict[str, Callable[[], object]]:
        """The timed functions by name."""
        return {"forward": self.attend, "backward": self.backward, "step": self.forward_and_backward}

    def backward(self) -> tuple[Tensor, ...]:
        """The gradients after an untimed forward on this stream: autograd runs a backward on its forward's stream."""
        import torch

        stream = torch.cuda.current_stream() if self.do.is_cuda else None
        if self._last_forward is None or self._last_forward[0] != stream:
            self._forget_forward()
            self._last_forward = (stream, self.attend())
        return torch.autograd.grad(self._last_forward[1], self.inputs, self.do, retain_graph=True)

    def forward_and_backward(self) -> tuple[Tensor, ...]:
        import torch

        self._forget_forward()
        return torch.autograd.grad(self.attend(), self.inputs, self.do)

    def _forget_forward(self) -> None:
        """Free the graph of the last untimed forward: autograd's nodes of the inputs, which it keeps, belong to its
        stream, and a capture on another stream fails where it has to wait for that one."""
        self._last_forward = None

    def results(self) -> dict[str, Tensor]:
        """The output and the gradients by name, computed once."""
        import torch

        out = self.attend()
        grads = torch.autograd.grad(out, self.inputs, self.do)
        names = ("dq", "dr", "dk", "dv") if len(grads) == 4 else ("dq", "dk", "dv")
        results = {"out": out.detach(), **dict(zip(names, grads, strict=True))}
        return {name: self.restore(x) for name, x in results.items()}


@dataclass(frozen=True)
class Baseline:
    """One implementation. `forward`, `decode` and `step` are None if it has no such kernel.

    forward, decode, step  bind inputs. They raise ImportError if the package is not installed, NotImplementedError if
                           it has no kernel for the spec, and any other exception if they fail
    softmax                whether it computes softmax attention, which is less work than Parallax and has no error
    softcap                whether it can cap scores
    packages               the names of its distributions; empty for torch's baselines and ours
    setting                other settings that its time depends on, as text
    release                frees tensors that it would keep after a comparison
    """

    name: str
    forward: Callable[[KernelSpec, Inputs], AttentionCall] | None = None
    decode: Callable[[KernelSpec, Inputs], AttentionCall] | None = None
    step: Callable[[KernelSpec, Inputs], Step] | None = None
    softmax: bool = False
    softcap: bool = False
    packages: tuple[str, ...] = ()
    setting: Callable[[], str] = lambda: ""
    release: Callable[[], None] = lambda: None

    def has(self, op: str) -> bool:
        """Whether it has a kernel for `op`: "forward", "decode" or TRAINING."""
        return (self.step if op == TRAINING else self._function(op)) is not None

    def prepare(self, op: str, spec: KernelSpec, x: Inputs) -> Prepared:
        """Bind it to inputs for an op that it has. Raises NotImplementedError, and whatever its function raises."""
        if spec.softcap and not self.softcap:
            raise NotImplementedError("no softcap")
        if op == TRAINING:
            assert self.step is not None
            return self.step(spec, x)
        function = self._function(op)
        assert function is not None
        return SingleOutput(op, function(spec, x))

    def package(self) -> str:
        """Versions and setting: `parallax-kernel 0.1.1, helion 1.2.0, HELION_AUTOTUNE_EFFORT=none`.

        Skips missing packages.
        """
        versions = []
        for name in self.packages:
            with suppress(metadata.PackageNotFoundError):
                versions.append(f"{name} {metadata.version(name)}")
        return ", ".join([*versions, *filter(None, [self.setting()])])

    def _function(self, op: str) -> Callable[[KernelSpec, Inputs], AttentionCall] | None:
        return {"forward": self.forward, "decode": self.decode}[op]


def refuse_unsupported(spec: KernelSpec, *, lengths: str = "", **reasons: str) -> None:
    """Raise NotImplementedError if the spec sets a flag that a baseline does not support.

    reasons  unsupported flag -> message
    lengths  the message if per-sequence lengths are unsupported
    """
    if lengths and op_of(spec).per_sequence_lengths:
        raise NotImplementedError(lengths)
    for flag, reason in reasons.items():
        if getattr(spec, flag):
            raise NotImplementedError(reason)


def require_causal(spec: KernelSpec) -> None:
    """Raise NotImplementedError unless the spec is causal, as other packages' training kernels are."""
    if not spec.causal:
        raise NotImplementedError("causal attention only")


def require_dense_causal(spec: KernelSpec) -> None:
    """Raise NotImplementedError unless the spec is dense and causal."""
    require_causal(spec)
    refuse_unsupported(spec, varlen="its packed sequences are not benchmarked")


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Leaf tensors that require gradients, on the same memory as `tensors`."""
    return tuple(t.detach().requires_grad_() for t in tensors)


def gradient_of_output(x: Inputs) -> Tensor:
    """The gradient of out in a training step's inputs."""
    assert x.do is not None
    return x.do


@contextmanager
def autotuning_with_few_calls() -> Iterator[None]:
    """Inside this context Triton's autotuners time each config with a few calls instead of an eighth of a second."""
    from triton.runtime.autotuner import Autotuner

    original = vars(Autotuner)["do_bench"]
    Autotuner.do_bench = property(lambda self: _time_few_calls)
    try:
        yield
    finally:
        Autotuner.do_bench = original


def _time_few_calls(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    """Milliseconds per call: the median, repeated for every requested quantile."""
    from parallax_gen.tuning.workers.measure import event_times_us

    call()
    times = [us for _ in range(CALLS_PER_CONFIG) for us in event_times_us(call, 1)]
    return [statistics.median(times) / 1000] * len(quantiles)
