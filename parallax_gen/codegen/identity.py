"""Fingerprints by the hash of a kernel's text, so that no text is parsed twice: what is known is kept in a folder."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from pathlib import Path

from parallax_gen.codegen.fingerprint import DIGITS, VERSION, fingerprint
from parallax_gen.codegen.folders import cache_dir
from parallax_gen.errors import MachineError

# By the text's hash: what this process or an earlier one found.
_FOUND: dict[str, str] = {}


def found(text: str, hashed: str) -> str:
    """The fingerprint of a kernel's file, whose text below the header has this hash."""
    if hashed not in _FOUND:
        _FOUND[hashed] = _kept(hashed) or _keep(hashed, fingerprint(text))
    return _FOUND[hashed]


def _path(hashed: str) -> Path:
    return cache_dir() / f"fingerprints-{VERSION}" / hashed


def _kept(hashed: str) -> str | None:
    """What an earlier process found; None where none did, or what is there is damaged."""
    with contextlib.suppress(OSError, UnicodeDecodeError, MachineError):
        kept = _path(hashed).read_text(encoding="utf-8")
        if re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", kept):
            return kept
    return None


def _keep(hashed: str, kernel: str) -> str:
    """For later processes; where there is no room for it, they find it out again."""
    with contextlib.suppress(OSError, MachineError):
        path = _path(hashed)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        part.write_text(kernel, encoding="utf-8")
        os.replace(part, path)
    return kernel
