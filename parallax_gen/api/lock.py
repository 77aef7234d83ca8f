"""`parallax_gen.lock`: writes which kernel each place of a model gets."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from parallax_gen.api.targets import Kernel, Sizes, only_one, refuse_options_of_models, target_of
from parallax_gen.api.tune import recorded_calls
from parallax_gen.codegen import device
from parallax_gen.errors import UnknownGpuError
from parallax_gen.memory.lock import Lock
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import representative
from parallax_gen.runtime.locking import lock_kernels, not_checked

if TYPE_CHECKING:
    import os

    from parallax_gen.api.targets import AnyModel
    from parallax_gen.runtime.recording import Recording


def lock(
    path: str | Path,
    model: AnyModel | None = None,
    *,
    kernels: Kernel | Iterable[Kernel] | None = None,
    calls: str | os.PathLike[str] | Recording | None = None,
    training: Sizes = None,
    serving: Sizes = None,
    tp: int = 1,
    dtype: str | None = None,
    gpu: str | None = None,
    add: bool = False,
) -> Lock:
    """Write which kernel calls get now into a lock, for `use_lock` and PARALLAX_GEN_LOCK: `parallax-gen lock`.

    path  the file, of JSON lines; a file that is no lock is not replaced
    model, kernels, training, serving, tp, dtype  as in `parallax_gen.tune`
    calls  as in `parallax_gen.tune`; all kernels of a recording are locked, also the cheapest
    gpu    by default the card in this machine; or the name of another
    add    keep the file's kernels of other places

    Nothing is measured. On the card, borrowed kernels are compiled and checked for spills, as a first call would; a
    warning says how many could not be checked elsewhere.

    Returns the lock, which is not used yet. Raises ArgumentError, UnknownGpuError, StoreError for a file or a database
    that cannot be used, ConfigError for a kernel that no config fits, and MachineError if the machine is at fault.
    """
    only_one(model=model, kernels=kernels, calls=calls)
    wanted: list[Kernel]
    if calls is not None:
        refuse_options_of_models(training=training, serving=serving, tp=tp, dtype=dtype)
        wanted = [(spec, representative(bucket, spec.group)) for spec, bucket in recorded_calls(calls)]
    else:
        wanted = target_of(model, kernels, training=training, serving=serving, tp=tp, dtype=dtype).kernels
    here = device.gpu_here(None)
    if gpu is None and here is None:
        raise UnknownGpuError("there is no CUDA device here: name a GPU, such as gpu='h200'")
    card = here if here is not None and gpu in (None, here.name) else gpu_by_name(str(gpu))
    with closing(Store(read_only=True)) as store:
        written, choices = lock_kernels(Path(path).expanduser().absolute(), wanted, card, Memory(store), add=add)
    if note := not_checked(choices):
        warnings.warn(note, stacklevel=2)
    return written
