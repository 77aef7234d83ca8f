"""`parallax-gen doctor`: checks that everything needed is installed and works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import click

from parallax_gen.cli.options import json_option
from parallax_gen.cli.text import print_json, print_text
from parallax_gen.errors import ParallaxGenError, tune_extra
from parallax_gen.tuning.installation import CHECKS


@dataclass(frozen=True)
class Finding:
    """One result of a check. status is "ok", "note" (good to know, not an error) or "broken"."""

    check: str
    status: str
    text: str


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check that everything needed is installed and works.

    The exit status is 1 if something is broken.

    \b
    Example
      parallax-gen doctor
    """
    findings = []
    for check, find in CHECKS.items():
        for finding in _run_check(check, find):
            findings.append(finding)
            if not as_json:
                print_text(f"{finding.check:<9} {finding.status:<7} {finding.text}", indent=" " * 18)
    broken = any(finding.status == "broken" for finding in findings)
    if as_json:
        print_json({"broken": broken, "findings": [asdict(finding) for finding in findings]})
    ctx.exit(1 if broken else 0)


def _run_check(check: str, find: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[Finding]:
    """The findings of one check. Expected errors and missing files or modules become findings."""
    try:
        with tune_extra("tuning"):
            for status, text in find():
                yield Finding(check, status, text)
    except (ParallaxGenError, ImportError, OSError) as error:
        yield Finding(check, "broken", " ".join(str(error).split()))
