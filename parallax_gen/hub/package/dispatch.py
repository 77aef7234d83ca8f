"""Chooses the kernel of a call: the best ranked one of its bucket on its card, as configs/ has it.

parallax_gen ranked the kernels when this package was made, by the same rules as for its own calls: for each toolchain
(Triton and ptxas) that a record was measured with, and for any other. A borrowed kernel was measured with another
toolchain or on a card of the same capability; it is compiled first, and refused if it spills far more than the default.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FrameType, ModuleType
from typing import Any

from parallax_gen.errors import BuildError, UnknownGpuError
from parallax_gen.hub.package.kernels import Resources, compile_here, load, render
from parallax_gen.hub.package.records import ROOT, PackagedSpec, cards, choices, packaged
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket, Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec

_LOG = logging.getLogger(__name__)

MEASURED_HERE, DEFAULT = 1, 5  # tiers: 2 another toolchain, 3 a sibling card, 4 a near bucket
MAX_EXTRA_SPILLS = 128  # how many more bytes per thread a borrowed kernel may spill than the default

CompiledResources = Callable[[Any], Resources]


@dataclass(frozen=True)
class Choice:
    """The config of a call's kernel, and where it comes from. time_us: of its record, None for the default"""

    config: Any
    tier: int
    time_us: float | None


def candidates(spec: KernelSpec, bucket: Bucket, card: str, toolchain: str) -> list[Choice]:
    """What a call considers, best first; the default is the last.

    toolchain  as `toolchain_here` says it
    """
    kernels, known = packaged(spec).kernels, choices(card, spec)
    ranked = [Choice(kernels[kernel].config, tier, us) for kernel, tier, us in known.at(bucket, toolchain)]
    default = Choice(kernels[known.defaults[known.position(bucket)]].config, DEFAULT, None)
    return ranked if ranked and ranked[-1].tier in (MEASURED_HERE, DEFAULT) else [*ranked, default]


def first_good(options: list[Choice], gpu: Gpu, compiled: CompiledResources | None) -> Choice:
    """The first candidate that is not borrowed, has the default's config, or compiles well.

    compiled  None where nothing can be compiled: then the first candidate
    """
    for option in options:
        if compiled is None or option.tier in (MEASURED_HERE, DEFAULT) or option.config == options[-1].config:
            return option
        reason = _why_refused(option, options[-1], gpu, compiled)
        if not reason:
            return option
        _LOG.info("%s is not used: %s", option, reason)
    return options[-1]


def _why_refused(option: Choice, default: Choice, gpu: Gpu, compiled: CompiledResources) -> str:
    """Why a borrowed kernel is not used; "" if it is. The default is compiled only if its spills decide."""
    try:
        resources = compiled(option.config)
    except BuildError as error:
        return f"it does not compile here: {error}"
    if resources.shared_bytes > gpu.shared_per_block:
        return f"it needs {resources.shared_bytes} bytes of shared memory, and the card has {gpu.shared_per_block}"
    if resources.spills <= MAX_EXTRA_SPILLS:
        return ""
    try:
        spills = compiled(default.config).spills
    except BuildError:
        return ""
    if resources.spills <= spills + MAX_EXTRA_SPILLS:
        return ""
    return f"it spills {resources.spills} bytes per thread, the default {spills}"


class Dispatcher:
    """Chooses and loads kernels, each once."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[KernelSpec, Bucket, str], tuple[Choice, ModuleType]] = {}

    def kernel(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> tuple[Choice, ModuleType]:
        """The choice for a call, and the module to launch. Raises ArgumentError if the package has no such kernel."""
        key = spec, bucket_of(shape), gpu.name
        chosen = self._kernels.get(key)
        if chosen is None:
            entry, card = packaged(spec), card_like(gpu)
            options = candidates(spec, key[1], card, toolchain_here())
            choice = first_good(options, gpu, _compiler(entry, shape, gpu))
            chosen = self._kernels[key] = choice, load(render(spec, choice.config, gpu))
            _LOG.info("%s; %s, on %s: %s runs %s", spec, key[1], card, choice, chosen[1].__file__)
        return chosen


@cache
def default_dispatcher() -> Dispatcher:
    """The dispatcher of this process."""
    return Dispatcher()


@cache
def toolchain_here() -> str:
    """This process's toolchain, as configs/ names toolchains."""
    here = Toolchain.here()
    return toolchain_key(here.triton, here.cuda)


def toolchain_key(triton: str, cuda: str) -> str:
    """The name of a toolchain in configs/. Kernels change with Triton's major.minor, and every release of ptxas."""
    return f"Triton {minor(triton)}, ptxas {cuda}"


@cache
def card_like(gpu: Gpu) -> str:
    """The card of this package whose kernels a GPU launches: itself, or the most similar one on which they fit.

    Warns if it is another. Raises UnknownGpuError if no kernels fit.
    """
    if gpu.name in cards():
        return gpu.name
    fitting = [
        name
        for name, card in cards().items()
        if tuple(card["capability"]) <= gpu.capability and card["shared_per_block"] <= gpu.shared_per_block
    ]
    if not fitting:
        raise UnknownGpuError(f"this package has kernels for {', '.join(cards())}, which do not fit on {gpu.title}")
    card = max(fitting, key=lambda name: (cards()[name]["capability"], -abs(cards()[name]["sms"] - gpu.sms)))
    message = f"this package has no kernels for {gpu.title}: those for {card} are used, which may be slow here"
    warnings.warn(message, stacklevel=user_stacklevel())
    return card


def _compiler(entry: PackagedSpec, shape: Shape, gpu: Gpu) -> CompiledResources | None:
    """A function that compiles a config's kernel; None without a CUDA device.

    None for batch-invariant calls, too: dense and paged ones must get the same config.
    """
    import torch
    import triton

    if entry.spec.batch_invariant or triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return None
    return lambda config: compile_here(render(entry.spec, config, gpu), entry.spec, config, shape)


def user_stacklevel() -> int:
    """The stacklevel with which a warning raised in the calling function names the first line outside this package."""
    frame: FrameType | None = sys._getframe(1)
    level = 0
    while frame is not None:
        level += 1
        name = str(frame.f_globals.get("__name__", ""))
        if name and not f"{name}.".startswith((f"{ROOT}.", "torch.")):
            break
        frame = frame.f_back
    return level
