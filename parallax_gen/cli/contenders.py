"""Who is compared at what: ours first, then torch's softmax attention and other Parallax kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn.attention import SDPBackend

from parallax_gen.cli import peers, steps
from parallax_gen.cli.peers import Call
from parallax_gen.codegen.calling import Inputs
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.usual import TRAINING

OURS = "parallax_gen"


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


@dataclass(frozen=True)
class Contender:
    """One implementation. `parallax` is False for plain softmax attention: less work, so no error to compare.

    prepare  on given inputs; raises ImportError where it is not installed, NotImplementedError where it has no such
             kernel, and anything where it cannot
    """

    name: str
    parallax: bool
    prepare: Callable[[KernelSpec, Inputs], Prepared]


def contenders(op: str) -> list[Contender]:
    """Ours first. op: "forward", "decode" or TRAINING."""
    if op == TRAINING:
        return [
            Contender(OURS, True, steps.ours_step),
            Contender("SDPA flash", False, lambda spec, x: steps.sdpa_step(SDPBackend.FLASH_ATTENTION, spec, x)),
            Contender("SDPA cuDNN", False, lambda spec, x: steps.sdpa_step(SDPBackend.CUDNN_ATTENTION, spec, x)),
            Contender("official Triton", True, steps.official_triton_step),
            Contender("fla", True, steps.fla_step),
        ]

    def single(name: str, call: Callable[[KernelSpec, Inputs], Call], *, parallax: bool = True) -> Contender:
        return Contender(name, parallax, lambda spec, x: Single(op, call(spec, x)))

    def flash(spec: KernelSpec, x: Inputs) -> Call:
        return peers.sdpa(SDPBackend.FLASH_ATTENTION, spec, x.q, x.k, x.v)

    def cudnn(spec: KernelSpec, x: Inputs) -> Call:
        return peers.sdpa(SDPBackend.CUDNN_ATTENTION, spec, x.q, x.k, x.v)

    softmax = [single("SDPA flash", flash, parallax=False), single("SDPA cuDNN", cudnn, parallax=False)]
    if op == "decode":
        return [
            single(OURS, peers.ours_decode),
            *softmax,
            single("official CuTeDSL", peers.official_cutedsl_decode),
            single("official Triton", peers.official_triton_decode),
            single("fla", peers.fla_decode),
        ]
    return [
        single(OURS, peers.ours_forward),
        *softmax,
        single("official Triton", peers.official_triton_forward),
        single("fla", peers.fla_forward),
    ]
