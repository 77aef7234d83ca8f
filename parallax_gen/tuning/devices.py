"""Which GPUs a tune measures on if none are named: all of one card that no other process uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from parallax_gen.errors import CONTEXT_BYTES, MeasureError
from parallax_gen.problem.hardware import Gpu, gpu_by_name

# A GPU is in use if more of its memory than this is taken. The measuring child's own CUDA context takes about half of
# it, and a screen less than the rest; another program that computes has a context, too, and tensors.
IN_USE_BYTES = CONTEXT_BYTES


class DeviceChild(Protocol):
    """The methods of `workers.worker.Worker` that tell of its device."""

    def identify(self) -> Gpu | None: ...

    def taken_bytes(self) -> int: ...


def free_devices(
    measuring: Mapping[int, DeviceChild],
    *,
    name: str | None,
    say: Callable[[str], None],
    own_bytes: Callable[[int], int] = lambda device: 0,
) -> tuple[int, ...]:
    """Of the devices with a measuring child those of one card that no other process uses.

    If all of that card are in use, the first of them; if none is of the card, the first device, which the caller
    refuses. A single device is not inspected.

    name       of the card; by default the card of the first free device
    say        gets a line on which devices are used, and why others are left out; none for a single device
    own_bytes  the memory of a device that this process takes, which does not count as in use

    Raises UnknownGpuError for an unknown name, and MeasureError if no child can use its device.
    """
    if len(measuring) == 1:
        return tuple(measuring)
    cards, left_out = _inspect(measuring, own_bytes)
    if not cards:
        return tuple(measuring)[:1]
    free = [device for device in cards if device not in left_out]
    wanted = cards[(free or [*cards])[0]].name if name is None else _name_in_records(name, cards)
    of_card = [device for device, card in cards.items() if card.name == wanted]
    if not of_card:
        return tuple(cards)[:1]
    left_out |= {n: f"GPU {n} is another card ({card.name})" for n, card in cards.items() if card.name != wanted}
    chosen = [device for device in of_card if device in free]
    if chosen:
        used = f"uses {_listed(chosen)}"
    else:
        chosen = of_card[:1]
        used = f"{left_out.pop(chosen[0])}, but no other is free, so it is used: times may be disturbed"
    say("; ".join([used, *(left_out[device] for device in sorted(left_out))]))
    return tuple(chosen)


def _inspect(
    measuring: Mapping[int, DeviceChild], own_bytes: Callable[[int], int]
) -> tuple[dict[int, Gpu], dict[int, str]]:
    """The cards of the devices that are found and work, and why devices are not free. MeasureError if none works."""
    cards: dict[int, Gpu] = {}
    left_out: dict[int, str] = {}
    faults: list[MeasureError] = []
    for device, child in measuring.items():
        try:
            card = child.identify()
            taken = child.taken_bytes() - own_bytes(device) if card is not None else 0
        except MeasureError as error:  # such as a lost card, or one in exclusive mode that another process uses
            faults.append(error)
            left_out[device] = str(error)
            continue
        if card is None:
            left_out[device] = f"GPU {device} is not found"
            continue
        cards[device] = card
        if taken > IN_USE_BYTES:
            left_out[device] = f"GPU {device} is in use ({taken / 2**30:.1f} GiB)"
    if faults and not cards:
        raise faults[0]
    return cards, left_out


def _name_in_records(name: str, cards: Mapping[int, Gpu]) -> str:
    """The name in records; a card that is not in the table has the name that it was detected with."""
    return name if name in {card.name for card in cards.values()} else gpu_by_name(name).name


def _listed(devices: list[int]) -> str:
    *others, last = map(str, devices)
    return f"GPUs {', '.join(others)} and {last}" if others else f"GPU {last}"
