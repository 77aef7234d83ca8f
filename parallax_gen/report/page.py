"""Renders the report as one HTML page that needs no network.

The figures are plain SVG and tables from a Jinja template. Only the template escapes text, themes are CSS, and a page
has a few hundred KB. We use no chart library: Plotly's smallest bundle is 1 MB and has no heat map, and Vega
compiles its charts at run time, which a content policy without eval forbids. For four kinds of figures, either costs
more than it saves.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

import parallax_gen
from parallax_gen.bench.parts import kernels_in
from parallax_gen.bench.summary import error_text
from parallax_gen.describe import LEGEND, brief, gain_text, number, seqlen_text
from parallax_gen.memory.result import Outcome
from parallax_gen.memory.toolchain import triton_version
from parallax_gen.problem.spec import PUBLIC_OPS
from parallax_gen.problem.work import rate_unit
from parallax_gen.report.charts import DECADES, history, rooflines
from parallax_gen.report.data import Report
from parallax_gen.report.entries import STATES, Entry
from parallax_gen.report.failures import FAILURES_IN_ORDER
from parallax_gen.report.matrices import FRACTIONS_OF_BOUND, RATIOS, coverage, kernel_name, speed_ups
from parallax_gen.report.sources import Sources
from parallax_gen.tuning.search.importances import MIN_TRIALS

WEB = Path(__file__).parent / "web"


def html(report: Report, command: str) -> str:
    """The page. command: the command to show on the page."""
    sources = Sources()
    kernels = report.kernels
    summary, tried = report.summary(), [kernel for kernel in kernels if kernel.tried]
    histories = {entry.key: drawn for entry in report.shown if (drawn := history(entry))}
    source_indices = {entry.key: _source_index(entry, sources) for kernel in kernels for entry in kernel.entries}
    style, script = (Markup((WEB / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            command=command,
            version=parallax_gen.__version__,
            triton=triton_version(),
            style=style,
            script=script,
            style_hash=_hash(style),
            script_hash=_hash(script),
            ops=[op for op in PUBLIC_OPS if op in summary],
            summary=summary,
            states_in_order=STATES,
            states_found={entry.state if entry else "untuned" for entry in report.by_place.values()},
            outcome_order=(Outcome.OK, *FAILURES_IN_ORDER),
            outcomes_found={outcome for kernel in tried for outcome in kernel.outcomes},
            tried=tried,
            importances=[(kernel, importances) for kernel in tried if (importances := kernel.importances)],
            any_differences=any(entry.differences for entry in report.shown),
            means=report.means,
            coverage=coverage(report.by_place),
            speed_ups=speed_ups(report.ratios),
            rooflines=rooflines(report.shown),
            kernels=kernels,
            histories=histories,
            first_drawn=next((i for i, kernel in enumerate(kernels) if kernel.has_any(histories)), None),
            ids={key: f"k{i}" for i, key in enumerate(source_indices)},
            sources=source_indices,
            packed=sources.packed(),
            share_bounds=[round(100 * bound) for bound in FRACTIONS_OF_BOUND],
            ratio_bounds=RATIOS,
            decades=DECADES,
            kernels_in=kernels_in,
            least_trials=MIN_TRIALS,
            legend=LEGEND,
            files=list(dict.fromkeys(file for file, _, _ in report.benches)),
        )
    )


def _source_index(entry: Entry, sources: Sources) -> int | None:
    return sources.add(entry.best, entry.gpu) if entry.best and entry.gpu else None


def _hash(text: str) -> str:
    """The hash by which the content security policy allows a script or style, so that injected ones cannot run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number,
        brief=brief,
        lengths=seqlen_text,
        rate_unit=rate_unit,
        kernel_name=kernel_name,
        percent=_percent,
        gain=gain_text,
        error=error_text,
    )
    return environment
