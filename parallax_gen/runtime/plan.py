"""What a call of given sizes, strides and types launches: decided once, then done with as little ado as can be."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from parallax_gen.codegen.calling import Scratch
from parallax_gen.runtime.replay import Launched, aligned, record, replay
from parallax_gen.runtime.workspace import Workspace


class LaunchPlan:
    """Launches a rendered module. `tensors` are always of the sizes and strides that the plan was made for."""

    def __init__(self, module: ModuleType, softmax_scale: float, device: int, scratch: Scratch):
        self._module = module
        self._softmax_scale = softmax_scale
        self._device = device
        self._scratch = scratch
        self._workspace = workspace_of(device) if scratch.partials else None
        self._recorded: tuple[Launched, ...] | None = None
        self._seen = False

    def launch(self, tensors: tuple[Tensor, ...]) -> None:
        """`tensors` in the order of the module's `launch`, on the current stream of their device."""
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                self._launch(tensors)
        else:
            self._launch(tensors)

    def _launch(self, tensors: tuple[Tensor, ...]) -> None:
        stream = _raw_stream(self._device)
        if self._workspace is not None:
            partials, arrived = self._workspace.get(self._scratch.partials, self._scratch.arrived, stream)
            tensors = (*tensors, partials, arrived) if self._scratch.arrived else (*tensors, partials)
        if not aligned(tensors):
            self._module.launch(*tensors, self._softmax_scale)
        elif self._recorded is not None:
            replay(self._recorded, tensors, stream)
        elif not self._seen:
            self._recorded = record(self._module, tensors, self._softmax_scale)
            self._seen = True
        else:  # a launch that cannot be recorded
            self._module.launch(*tensors, self._softmax_scale)


@cache
def workspace_of(device: int) -> Workspace:
    """The scratch that this process's launches on a device share."""
    return Workspace(torch.device("cuda", device))


def _raw_stream(device: int) -> int:
    """The handle of the current stream: what Triton itself launches on, at a tenth of torch's price for the object."""
    from triton.runtime import driver

    return int(driver.active.get_current_stream(device))
