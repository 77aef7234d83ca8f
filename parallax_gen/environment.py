"""Environment variables: those that switch something on or off, and those that name files."""

from __future__ import annotations

import os

from parallax_gen.errors import ArgumentError

STRICT = "PARALLAX_GEN_STRICT"  # raise an error for a kernel that was not measured here
QUIET = "PARALLAX_GEN_QUIET"  # do not warn about such a kernel
BATCH_INVARIANT = "PARALLAX_GEN_BATCH_INVARIANT"  # the first mode of runtime/invariance.py
SWITCHES = (STRICT, QUIET, BATCH_INVARIANT)
RECORD = "PARALLAX_GEN_RECORD"  # a file
LOCK = "PARALLAX_GEN_LOCK"  # a file: see memory/lock.py
LOCK_MISSING = "PARALLAX_GEN_LOCK_MISSING"  # what a call gets that is not in it

ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def is_on(variable: str) -> bool:
    """Whether a switch is on; an unset switch is off. Raises ArgumentError on a value that is in neither ON nor OFF."""
    value = os.environ.get(variable, "")
    if value.lower() not in (*ON, *OFF):
        raise ArgumentError(variable, repr(value), f"{', '.join(ON)} for on; {', '.join(filter(None, OFF))} for off")
    return value.lower() in ON
