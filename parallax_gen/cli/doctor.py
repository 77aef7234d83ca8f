"""`parallax-gen doctor`: checks that everything needed is installed and works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import click

from parallax_gen.cli.options import gpu_option, json_option
from parallax_gen.cli.text import print_json, print_text
from parallax_gen.errors import ParallaxGenError, tune_extra
from parallax_gen.tuning.installation import CHECKS, checks_of


@dataclass(frozen=True)
class Finding:
    """One result of a check. status is "ok", "note" (good to know, not an error) or "broken"."""

    check: str
    status: str
    text: str


@click.command()
@gpu_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, gpu: str | None, as_json: bool) -> None:
    """Check that everything needed is installed and works.

    With --gpu also compiles a kernel for that card. The exit status is 1 if something is broken.

    \b
    Example
      parallax-gen doctor
    """
    findings = []
    for check, find in (CHECKS | checks_of(gpu)).items():
        for finding in _run_check(check, find):
            findings.append(finding)
            if not as_json:
                print_text(f"{finding.check:<9} {finding.status:<7} {finding.text}", indent=" " * 18)
    broken = any(finding.status == "broken" for finding in findings)
    if as_json:
        print_json({"broken": broken, "findings": [asdict(finding) for finding in findings]})
    ctx.exit(1 if broken else 0)


def _run_check(check: str, find: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[Finding]:
    """The findings of one check, among them expected errors and missing files or modules."""
    try:
        with tune_extra("tuning"):
            yield from (Finding(check, status, text) for status, text in find())
    except (ParallaxGenError, ImportError, OSError) as error:
        yield Finding(check, "broken", " ".join(str(error).split()))
