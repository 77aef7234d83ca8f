"""Training steps to compare: the forward and its gradients, of ours, torch's softmax and other Parallax kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from parallax_gen.bench.baselines.flash_attn import FLASH
from parallax_gen.bench.baselines.peers import (
    check_dense_causal,
    from_heads,
    heads_first,
    in_heads,
    official_helion,
    ours,
    sdpa,
)
from parallax_gen.codegen.abi import Inputs
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import default_scale


@dataclass
class Step:
    """A training step in an implementation's own layout.

    attend   the output, with what its gradients need
    inputs   that have gradients: q, r, k, v; q, k, v of softmax
    do       the output's gradient
    restore  brings an output or a gradient into the layout of `Inputs`
    """

    attend: Callable[[], Tensor]
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
        stream = torch.cuda.current_stream() if self.do.is_cuda else None
        if self._before is None or self._before[0] != stream:
            self._before = (stream, self.attend())
        return torch.autograd.grad(self._before[1], self.inputs, self.do, retain_graph=True)

    def whole(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.attend(), self.inputs, self.do)

    def results(self) -> dict[str, Tensor]:
        """The output and the gradients by name, once through."""
        out = self.attend()
        grads = torch.autograd.grad(out, self.inputs, self.do)
        names = ("dq", "dr", "dk", "dv") if len(grads) == 4 else ("dq", "dk", "dv")
        found = {"out": out.detach(), **dict(zip(names, grads, strict=True))}
        return {name: self.restore(x) for name, x in found.items()}


def ours_step(spec: KernelSpec, x: Inputs) -> Step:
    q, r, k, v = _leaves(x.q, x.r, x.k, x.v)
    return Step(ours(spec, x, q, r, k, v), (q, r, k, v), _do(x))


def sdpa_step(backend: SDPBackend, spec: KernelSpec, x: Inputs) -> Step:
    q, k, v = _leaves(x.q, x.k, x.v)
    return Step(sdpa(backend, spec, q, k, v), (q, k, v), _do(x))


def flash_step(name: str, spec: KernelSpec, x: Inputs) -> Step:
    q, k, v = _leaves(x.q, x.k, x.v)
    return Step(FLASH[name].dense(spec, q, k, v, x.window_size), (q, k, v), _do(x))


def official_helion_step(spec: KernelSpec, x: Inputs) -> Step:
    """Its layout is (batch, heads, seqlen, head_dim): copied once, outside of what is timed."""
    official = official_helion()
    check_dense_causal(spec)
    q, r, k, v = _leaves(*(heads_first(t) for t in (x.q, x.r, x.k, x.v)))

    def attend() -> Tensor:
        out: Tensor = official.parallax_func(q, r, k, v, window_size_left=x.window_size or -1)
        return out

    return Step(attend, (q, r, k, v), heads_first(_do(x)), lambda t: t.transpose(1, 2))


def official_triton_step(spec: KernelSpec, x: Inputs) -> Step:
    """Its layout is (batch * heads, seqlen, head_dim): copied once, outside of what is timed."""
    official = importlib.import_module("parallax.triton")
    check_dense_causal(spec)
    batch, scale, window = x.q.shape[0], default_scale(spec.head_dim), x.window_size or -1
    q, r, k, v = _leaves(*(in_heads(t) for t in (x.q, x.r, x.k, x.v)))

    def attend() -> Tensor:
        out: Tensor = official.ParallaxFunction.apply(q, r, k, v, scale, spec.group, window)
        return out

    return Step(attend, (q, r, k, v), in_heads(_do(x)), lambda t: from_heads(t, batch))


def fla_step(spec: KernelSpec, x: Inputs) -> Step:
    fla = importlib.import_module("fla.ops.parallax.parallel")
    check_dense_causal(spec)
    q, r, k, v = _leaves(x.q, x.r, x.k, x.v)

    def attend() -> Tensor:
        out: Tensor = fla.parallel_parallax(q, r, k, v, window_size=x.window_size or None)
        return out

    return Step(attend, (q, r, k, v), _do(x))


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory, as tensors that have gradients."""
    return tuple(t.detach().requires_grad_() for t in tensors)


def _do(x: Inputs) -> Tensor:
    assert x.do is not None
    return x.do
