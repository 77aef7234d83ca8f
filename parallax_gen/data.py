"""Where the files lie that are not Python: the templates and the tuning database that ships, and the user's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from parallax_gen.errors import MachineError, ParallaxGenError

PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """The folder `name` ("templates", "tuning_db"): inside the package of a wheel, beside it in a checkout.

    Raises ParallaxGenError if it is in neither place.
    """
    places = (PACKAGE / name, PACKAGE.parent / name)
    for folder in places:
        if folder.is_dir():
            return folder
    looked = " or ".join(map(str, places))
    raise ParallaxGenError(f"the data folder {name!r} is missing: not at {looked}; install parallax-gen again")


def user_path(variable: str, default: Callable[[], str]) -> Path:
    """The path that an environment variable names, `~` expanded; else the default, such as one of platformdirs'.

    Raises MachineError, which names the variable, where that takes a home folder and there is none: a user without HOME
    and without an entry in passwd, as in many containers.
    """
    said = os.environ.get(variable)
    try:
        path = Path(said or default()).expanduser()
    except RuntimeError as error:
        raise MachineError(
            f"this user has no home folder{f' for {said}' if said else ''}: set {variable} to an absolute path"
        ) from error
    return path
