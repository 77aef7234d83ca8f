"""Where files lie that are not Python (templates, records that ship, the user's own), and how one is replaced."""

from __future__ import annotations

import os
import tempfile
import uuid
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import platformdirs

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


def replace_file(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a file so that whoever reads it finds the old text or the new one, whole. Makes its folder.

    durable  it is on the disk when this returns, and so is its name

    Raises OSError, and leaves nothing behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# -- Where kernels are kept: the user's folder, else a temporary one.


@cache
def cache_dir() -> Path:
    """Where rendered kernels are kept: $PARALLAX_GEN_CACHE_DIR, else the user's cache directory.

    Where that cannot be written, or there is none, a directory of this user's under the system's temporary one, with a
    warning. Raises MachineError where that cannot be written either.
    """
    try:
        wanted = user_path("PARALLAX_GEN_CACHE_DIR", lambda: platformdirs.user_cache_dir("parallax_gen"))
    except MachineError as error:
        return fallback_dir(f"kernels cannot be kept: {error}", error)
    try:
        try_to_write(wanted / "kernels")
        return wanted
    except OSError as error:
        return fallback_dir(f"cannot write kernels to {wanted} ({error})", error)


def try_to_write(folder: Path) -> None:
    """Raises OSError where a folder cannot be made or written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def fallback_dir(why: str, error: Exception) -> Path:
    """A directory of this user's under the system's temporary one, with a warning that says why."""
    try:
        folder = Path(tempfile.gettempdir()) / f"parallax_gen-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat().st_uid
        if owner == os.getuid():
            try_to_write(folder)
    except OSError as other:
        raise MachineError(f"{why}, nor to a temporary folder ({other})") from error
    if owner != os.getuid():  # somebody else's: what lies there is not ours to import
        raise MachineError(f"{why}, and {folder} is not yours") from error
    warnings.warn(f"{why}; using {folder}", stacklevel=3)
    return folder
