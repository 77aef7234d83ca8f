"""Environment variables that switch something on or off."""

from __future__ import annotations

import os

from parallax_gen.errors import ArgumentError

STRICT = "PARALLAX_GEN_STRICT"  # a kernel that was not measured here is an error
QUIET = "PARALLAX_GEN_QUIET"  # no warning of one
SWITCHES = (STRICT, QUIET)

ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def is_on(variable: str) -> bool:
    """Whether a switch is on; one that is not set is off. Raises ArgumentError on a value of another kind."""
    said = os.environ.get(variable, "")
    if said.lower() not in (*ON, *OFF):
        raise ArgumentError(variable, repr(said), f"{', '.join(ON)} for on; {', '.join(filter(None, OFF))} for off")
    return said.lower() in ON
