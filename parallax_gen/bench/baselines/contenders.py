"""Who is compared at what: ours first, then torch's softmax attention and other Parallax kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from parallax_gen.bench.baselines import peers, steps
from parallax_gen.bench.baselines.flash_attn import FLASH
from parallax_gen.bench.baselines.peers import Call
from parallax_gen.bench.rows import CONTENDERS, OURS, SOFTMAX
from parallax_gen.codegen.abi import Inputs
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import TRAINING


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

    prepare   on given inputs; raises ImportError where it is not installed, NotImplementedError where it has no such
              kernel, and anything where it cannot
    packages  the distributions it comes from, of torch's and our own none
    setting   what else its time depends on
    """

    name: str
    parallax: bool
    prepare: Callable[[KernelSpec, Inputs], Prepared]
    packages: tuple[str, ...] = ()
    setting: str = ""

    def package(self) -> str:
        """`parallax-kernel 0.1.1, helion 1.2.0, HELION_AUTOTUNE_EFFORT=none`; without what is not installed."""
        found = []
        for name in self.packages:
            with suppress(metadata.PackageNotFoundError):
                found.append(f"{name} {metadata.version(name)}")
        return ", ".join([*found, *filter(None, [self.setting])])


def contenders(op: str) -> list[Contender]:
    """In the order of rows.CONTENDERS: ours first. op: "forward", "decode" or TRAINING."""
    able = _STEPS if op == TRAINING else {name: _single(op, call) for name, call in _CALLS[op].items()}
    return [
        Contender(name, name not in SOFTMAX, able[name], PACKAGES.get(name, ()), _setting(name))
        for name in CONTENDERS
        if name in able
    ]


PACKAGES = {
    "flash-attn 2": ("flash-attn",),
    "flash-attn 3": ("flash-attn-3", "flashattn-hopper"),  # one of these names
    "flash-attn 4": ("flash-attn-4",),
    "official CuTeDSL": ("parallax-kernel", "nvidia-cutlass-dsl"),
    "official Triton": ("parallax-kernel",),
    "official Helion": ("parallax-kernel", "helion"),
    "fla": ("fla-core",),
}

SDPA = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}

_STEPS: dict[str, Callable[[KernelSpec, Inputs], Prepared]] = {
    OURS: steps.ours_step,
    **{name: partial(steps.sdpa_step, backend) for name, backend in SDPA.items()},
    **{name: partial(steps.flash_step, name) for name in FLASH},
    "official Triton": steps.official_triton_step,
    "official Helion": steps.official_helion_step,
    "fla": steps.fla_step,
}


def _sdpa(backend: SDPBackend, spec: KernelSpec, x: Inputs) -> Call:
    return peers.sdpa(backend, spec, x.q, x.k, x.v)


def _flash(name: str, spec: KernelSpec, x: Inputs) -> Call:
    return FLASH[name].dense(spec, x.q, x.k, x.v, x.window_size)


_CALLS: dict[str, dict[str, Callable[[KernelSpec, Inputs], Call]]] = {
    "forward": {
        OURS: peers.ours_forward,
        **{name: partial(_sdpa, backend) for name, backend in SDPA.items()},
        **{name: partial(_flash, name) for name in FLASH},
        "official Triton": peers.official_triton_forward,
        "official Helion": peers.official_helion_forward,
        "fla": peers.fla_forward,
    },
    "decode": {
        OURS: peers.ours_decode,
        **{name: partial(_sdpa, backend) for name, backend in SDPA.items()},
        **{name: flash.decode for name, flash in FLASH.items()},
        "official CuTeDSL": peers.official_cutedsl_decode,
        "official Triton": peers.official_triton_decode,
        "official Helion": peers.official_helion_decode,
        "fla": peers.fla_decode,
    },
}


def _single(op: str, call: Callable[[KernelSpec, Inputs], Call]) -> Callable[[KernelSpec, Inputs], Prepared]:
    return lambda spec, x: Single(op, call(spec, x))


def _setting(name: str) -> str:
    if name == "SDPA cuDNN":
        return f"cuDNN {torch.backends.cudnn.version()}"
    if name == "official Helion":
        return f"{peers.HELION_EFFORT}={os.environ.get(peers.HELION_EFFORT, 'none')}"
    return ""
