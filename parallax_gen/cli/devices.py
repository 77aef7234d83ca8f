"""The devices that `tune` measures on. All must be of the same GPU type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from parallax_gen.cli.options import gpu_or_stand_in, resolve_gpu
from parallax_gen.errors import UnknownGpuError
from parallax_gen.problem.hardware import Gpu

if TYPE_CHECKING:
    from parallax_gen.tuning.workers.worker import Worker


def parse_devices(text: str) -> tuple[int, ...]:
    """Parse indices such as 0,2,3. Raises BadParameter."""
    try:
        devices = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of indices, such as 0,1") from error
    if min(devices) < 0 or len(set(devices)) < len(devices):
        raise click.BadParameter(f"{text!r} is not a list of distinct indices from 0 on, such as 0,1")
    return devices


devices_option = click.option(
    "--devices",
    type=parse_devices,
    metavar="N,...",
    help="GPUs to measure on, by index. Default: all of one card that no other process uses.",
)


def card_to_tune(name: str | None, measuring: Mapping[int, Worker]) -> tuple[Gpu, bool]:
    """The GPU to tune for, and whether it is present and can measure.

    Raises UnknownGpuError if a device is missing, or differs from the first device or from `name`.
    """
    cards = {device: worker.identify() for device, worker in measuring.items()}
    first = next(iter(cards.values()))
    if first is None and tuple(cards) == (0,):  # no other device was requested
        return gpu_or_stand_in(name, lambda: None), False
    gpu = resolve_gpu(name, lambda: first)
    for device, card in cards.items():
        if card is None:
            raise UnknownGpuError(f"--devices: there is no CUDA device {device} here")
        if name is not None and card.name != gpu.name:
            raise UnknownGpuError(
                f"--gpu is {gpu.name}, but the card here is {card.name} ({card.title}): "
                f"tune on a machine with {gpu.name}, or select that card with --devices or CUDA_VISIBLE_DEVICES"
            )
        if card.name != gpu.name:
            raise UnknownGpuError(f"--devices: {device} is {card.name}, but the first one is {gpu.name}")
    return gpu, True
