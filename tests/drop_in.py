"""Programs written for the packages that `parallax_gen.compat` stands in for, run with their imports changed."""

from __future__ import annotations

import re
from pathlib import Path

PROGRAMS = sorted((Path(__file__).parent / "peer_programs").glob("*.py"))
MODULES = {
    "parallax": "official",
    "parallax.triton": "official_triton",
    "fla.ops.parallax": "fla",
    "fla.ops.parallax.decode": "fla",
}


def run(program: Path, device: str, *, ours: bool = True) -> None:
    """Raises what the program does, AssertionError where its results differ. ours: not with the package itself."""
    text = program.read_text(encoding="utf-8")
    if ours:
        theirs = "|".join(map(re.escape, MODULES))
        text, changed = re.subn(rf"^from ({theirs})(?= import)", _ours, text, flags=re.MULTILINE)
        assert changed
    exec(compile(text.replace('"cuda"', repr(device)), program, "exec"), {})


def _ours(found: re.Match[str]) -> str:
    return f"from parallax_gen.compat.{MODULES[found[1]]}"
