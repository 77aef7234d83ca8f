"""Whether calls are batch-invariant that do not say it themselves: `parallax_gen.batch_invariant`."""

from __future__ import annotations

from parallax_gen.environment import BATCH_INVARIANT, is_on
from parallax_gen.errors import ArgumentError

# A plain global, so that torch.compile guards on it: code that was compiled in one mode is compiled again in the other.
_mode = is_on(BATCH_INVARIANT)


class batch_invariant:
    """Make the calls of this process that do not say it themselves batch-invariant from now on, or not.

        parallax_gen.batch_invariant(True)

        with parallax_gen.batch_invariant():  # the mode before comes back at the end
            model(tokens)

    mode  whether calls with batch_invariant=None, the default, are batch-invariant

    The bits of a sequence's results then do not depend on the batch around it: docs/batch_invariance.md. The mode is of
    the process, for all its threads; it begins as PARALLAX_GEN_BATCH_INVARIANT says when the functions are imported. It
    counts when a function is called: a backward follows its forward, and a captured CUDA graph keeps its kernels.
    Compiled code is compiled again when the mode changes. Raises ArgumentError.
    """

    def __init__(self, mode: bool = True):
        global _mode
        if type(mode) is not bool:
            raise ArgumentError("mode", repr(mode), "True or False")
        self._before = _mode
        _mode = mode

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _mode
        _mode = self._before


def is_batch_invariant(batch_invariant: bool | None) -> bool:
    """Whether a call with this argument is batch-invariant. Raises ArgumentError."""
    if batch_invariant is None:
        return _mode
    check_batch_invariant(batch_invariant)
    return batch_invariant


def check_batch_invariant(batch_invariant: bool | None) -> None:
    if batch_invariant is not None and type(batch_invariant) is not bool:
        raise ArgumentError("batch_invariant", repr(batch_invariant), "True, False, or None for the process's mode")
