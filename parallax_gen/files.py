"""The folders of data files (templates, shipped records, the user's cache), and the atomic replacement of a file."""

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
    """The folder `name` ("templates", "tuning_db", "figures"): inside an installed package, beside it in a checkout.

    Raises ParallaxGenError if it is missing.
    """
    candidates = (PACKAGE / name, PACKAGE.parent / name, PACKAGE.parent / "docs" / name)
    for folder in candidates:
        if folder.is_dir():
            return folder
    paths = ", ".join(map(str, candidates))
    raise ParallaxGenError(f"the data folder {name!r} is none of {paths}: install parallax-gen again")


def user_path(variable: str, default: Callable[[], str]) -> Path:
    """The path in an environment variable, with `~` expanded; else the default, such as a platformdirs folder.

    Raises MachineError, which names the variable, if the path needs a home folder and the user has none: no HOME and no
    entry in passwd, as in many containers.
    """
    value = os.environ.get(variable)
    try:
        path = Path(value or default()).expanduser()
    except RuntimeError as error:
        raise MachineError(
            f"this user has no home folder{f' for {value}' if value else ''}: set {variable} to an absolute path"
        ) from error
    return path


def replace_file(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file atomically: a reader sees the whole old text or the whole new text. Creates the folder.

    durable  sync the file and its folder to disk before returning

    Raises OSError, and then leaves no temporary file behind.
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


# -- The folder of rendered kernels: the user's cache, else a temporary folder.


@cache
def cache_dir() -> Path:
    """The folder of rendered kernels: $PARALLAX_GEN_CACHE_DIR, else the user's cache directory.

    If that cannot be written, or the user has no home folder, it is a private folder in the system's temporary
    directory, with a warning. Raises MachineError if that cannot be written either.
    """
    try:
        folder = user_path("PARALLAX_GEN_CACHE_DIR", lambda: platformdirs.user_cache_dir("parallax_gen"))
    except MachineError as error:
        return fallback_dir(f"kernels cannot be cached: {error}", error)
    try:
        try_to_write(folder / "kernels")
        return folder
    except OSError as error:
        return fallback_dir(f"cannot write kernels to {folder} ({error})", error)


def try_to_write(folder: Path) -> None:
    """Create a folder and a temporary file in it. Raises OSError if either fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def fallback_dir(reason: str, error: Exception) -> Path:
    """A private folder of this user in the system's temporary directory. Warns with the reason."""
    try:
        folder = Path(tempfile.gettempdir()) / f"parallax_gen-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat().st_uid
        if owner == os.getuid():
            try_to_write(folder)
    except OSError as other:
        raise MachineError(f"{reason}, nor to a temporary folder ({other})") from error
    if owner != os.getuid():  # importing kernels from another user's folder would run that user's code
        raise MachineError(f"{reason}, and {folder} belongs to another user") from error
    warnings.warn(f"{reason}; using {folder}", stacklevel=3)
    return folder
