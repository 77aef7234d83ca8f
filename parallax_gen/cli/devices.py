"""The devices that a tune measures on, and which GPU they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from parallax_gen.cli.options import gpu_meant
from parallax_gen.errors import UnknownGpuError
from parallax_gen.problem.hardware import Gpu

if TYPE_CHECKING:
    from parallax_gen.tuning.workers.worker import Worker


def devices_of(text: str) -> tuple[int, ...]:
    """The indices in a text such as 0,2,3. Raises BadParameter."""
    try:
        devices = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of indices, such as 0,1") from error
    if min(devices) < 0 or len(set(devices)) < len(devices):
        raise click.BadParameter(f"{text!r} is not a list of different indices from 0 on, such as 0,1")
    return devices


devices_option = click.option(
    "--devices", type=devices_of, default="0", show_default=True, metavar="N,...", help="GPUs to measure on, by index."
)


def card_as_seen_by(worker: Worker) -> Gpu | None:
    """The GPU that a measuring worker has; None for none."""
    return worker.identify()


def card_to_tune(name: str | None, measuring: Mapping[int, Worker]) -> tuple[Gpu, bool]:
    """The GPU to tune for, and whether it is there to measure on, as every device is.

    Raises UnknownGpuError where a device is missing, or is another GPU than the first one or than `name`.
    """
    cards = {device: card_as_seen_by(worker) for device, worker in measuring.items()}
    first = next(iter(cards.values()))
    wanted = gpu_meant(name, lambda: first)
    if first is None and tuple(cards) == (0,):  # nobody asked for a device in particular
        return wanted, False
    for device, card in cards.items():
        if card is None:
            raise UnknownGpuError(f"--devices: there is no CUDA device {device} here")
        if name is not None and card.name != wanted.name:
            raise UnknownGpuError(
                f"--gpu says {wanted.name}, but the card here is {card.name} ({card.title}): "
                "tune where the card is, or choose it with --devices or CUDA_VISIBLE_DEVICES"
            )
        if card.name != wanted.name:
            raise UnknownGpuError(f"--devices: {device} is {card.name}, and not {wanted.name} as the first of them")
    return wanted, True
