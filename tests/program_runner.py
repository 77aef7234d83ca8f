"""Run programs written for parallax-kernel and fla, with their imports changed to `parallax_gen.compat`."""

from __future__ import annotations

import re
from pathlib import Path

PROGRAMS = sorted((Path(__file__).parent / "drop_in_programs").glob("*.py"))
MODULES = {
    "parallax": "parallax_kernel",
    "parallax.triton": "parallax_kernel_triton",
    "fla.ops.parallax": "fla",
    "fla.ops.parallax.decode": "fla",
}


def run_program(program: Path, device: str, *, ours: bool = True) -> None:
    """Run a program, which asserts that its results are right. ours: with our drop-ins, else the package itself."""
    text = program.read_text(encoding="utf-8")
    if ours:
        theirs = "|".join(map(re.escape, MODULES))
        text, changed = re.subn(rf"^from ({theirs})(?= import)", _our_import, text, flags=re.MULTILINE)
        assert changed
    exec(compile(text.replace('"cuda"', repr(device)), program, "exec"), {})


def _our_import(result: re.Match[str]) -> str:
    return f"from parallax_gen.compat.{MODULES[result[1]]}"
