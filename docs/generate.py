"""Write the generated pages of docs/: cli.md from the commands' help; figures.md, release.md and speedup.svg from
docs/figures/, release.md from the shipped records, too.

    python docs/generate.py [FOLDER]

They go to FOLDER, by default docs/. README.md, whose table of cards is written from the table of GPUs and the shipped
records, goes to FOLDER too, by default to where it is.

docs/figures/page.md is the text of figures.md. A line {{NAME}} in it becomes the table of NAME.csv, {{NAME WORDS}} one
that DERIVED computes from it. The columns `card`, `torch`, `Triton` and `date` of a CSV are the same in every row and
become the line above the table; `note` becomes footnotes at its row, which `; ` separates. docs/figures/release.md is
the text of release.md, likewise.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from xml.sax.saxutils import escape

import click

from parallax_gen.cli import main
from parallax_gen.codegen.render import text_hash_of
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import siblings
from parallax_gen.memory.shipped import load_shipped, shipped_gpus
from parallax_gen.memory.toolchain import NEWEST_TESTED, minor
from parallax_gen.problem.cards import FIRST_TRITON
from parallax_gen.problem.hardware import GPUS, Gpu, gpu_by_name
from parallax_gen.report.published import CHANGED

DOCS = Path(__file__).parent
FIGURES = DOCS / "figures"
CONDITIONS = ("card", "torch", "Triton", "date")
HELP_WIDTH = 100

Row = dict[str, str]


# -- cli.md


def cli_page() -> str:
    parts = ["# Commands", "The help of every command, written by `python docs/generate.py`."]
    for name, text in helps(main, click.Context(main, info_name="parallax-gen", terminal_width=HELP_WIDTH)):
        parts += [f"## {name}", f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def helps(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """The name and the help of a command, then of its subcommands."""
    context.help_option_names = ["-h", "--help"]
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from helps(below, click.Context(below, info_name=name, parent=context))


# -- figures.md

# Columns of decode_h200.csv.
SHAPE, OURS, CUTEDSL = "batch, heads, keys, head_dim", "parallax_gen, µs", "parallax-kernel CuTeDSL, µs"
SDPA = ("SDPA cuDNN (softmax), µs", "SDPA flash (softmax), µs")


def figures_page() -> str:
    text = (FIGURES / "page.md").read_text(encoding="utf-8")
    return re.sub(r"^\{\{(.*)\}\}$", lambda line: table(derived(line[1])), text, flags=re.MULTILINE)


def rows_of(name: str) -> list[Row]:
    with (FIGURES / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def derived(name: str) -> list[Row]:
    """The rows of a line of the page: of a CSV, or computed from one."""
    rows = rows_of(name.split()[0])
    return DERIVED[name](rows) if " " in name else rows


def by_grid(rows: list[Row]) -> list[Row]:
    """How parallax-kernel and the faster SDPA compare with ours, for each grid of decode's shapes and each head_dim."""
    groups = defaultdict[str, list[Row]](list)
    for row in rows:
        groups[f"{row['grid']}, head_dim {row[SHAPE].split(', ')[-1]}"].append(row)
    return [grid_summary(name, of) | {column: of[0][column] for column in CONDITIONS} for name, of in groups.items()]


def grid_summary(name: str, rows: list[Row]) -> Row:
    cutedsl = [float(row[CUTEDSL]) / float(row[OURS]) for row in rows]
    sdpa = [min(float(row[softmax]) for softmax in SDPA) / float(row[OURS]) for row in rows]
    return {
        "grid": name,
        "shapes": str(len(rows)),
        "CuTeDSL / ours, mean": f"{geometric_mean(cutedsl):.2f}",
        "CuTeDSL / ours, least": f"{min(cutedsl):.2f}",
        "faster SDPA / ours, mean": f"{geometric_mean(sdpa):.2f}",
        "faster SDPA / ours, least": f"{min(sdpa):.2f}",
        "ours no slower than SDPA": str(sum(ratio >= 1 for ratio in sdpa)),
        "or by up to 3 %": str(sum(ratio >= 1 / 1.03 for ratio in sdpa)),
        "note": "",
    }


def of_the_whole_model(rows: list[Row]) -> list[Row]:
    """The serving grid's shapes that are not split over GPUs."""
    whole = [row for row in rows if row["grid"] == "serving" and " 32/8, " in row[SHAPE]]
    return [{column: value for column, value in row.items() if column != "grid"} for row in whole]


DERIVED = {"decode_h200 by grid": by_grid, "decode_h200 of the whole model": of_the_whole_model}


def table(rows: list[Row]) -> str:
    """The conditions of all rows, the table, and its footnotes."""
    (conditions,) = {tuple(row[name] for name in CONDITIONS) for row in rows}
    card, torch, triton, date = conditions
    line = ", ".join(filter(None, [card, torch and f"torch {torch}", f"Triton {triton}", f"published {date}."]))
    names = [name for name in rows[0] if name not in (*CONDITIONS, "note")]
    notes = list(dict.fromkeys(note for row in rows for note in notes_of(row)))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        first, *others = (row[name] for name in names)
        marks = ", ".join(str(notes.index(note) + 1) for note in notes_of(row))
        lines.append("| " + " | ".join([first + (marks and f" <sup>{marks}</sup>"), *others]) + " |")
    feet = [f"<sup>{n}</sup> {note}." for n, note in enumerate(notes, 1)]
    return "\n\n".join([line, "\n".join(lines), *feet])


def notes_of(row: Row) -> list[str]:
    return row["note"].split("; ") if row["note"] else []


# -- release.md


def release_page() -> str:
    text = (FIGURES / "release.md").read_text(encoding="utf-8")
    return text.replace("{{measured}}", measured()).replace("{{shipped}}", shipped())


def measured() -> str:
    """Each CSV: where it is in figures.md, its conditions, and how many of its rows are of changed kernels."""
    lines = ["| table | card | torch | Triton | date | rows | changed |", "|" + "---|" * 7]
    heading = ""
    for line in (FIGURES / "page.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif name := re.fullmatch(r"\{\{(\w+)\}\}", line):
            rows = rows_of(name[1])
            anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            cells = [f"[{name[1]}](figures.md#{anchor})", *(rows[0][column] for column in CONDITIONS)]
            changed = sum(CHANGED in row["note"] for row in rows)
            lines.append("| " + " | ".join([*cells, str(len(rows)), str(changed)]) + " |")
    return "\n".join(lines)


def shipped() -> str:
    """How many kernels and sizes each card has records of today's kernels for, by toolchain, op and dtype."""
    lines = ["| card | Triton | ptxas | kernel | dtype | kernels and sizes |", "|" + "---|" * 6]
    for name in shipped_gpus():
        gpu, places = gpu_by_name(name), defaultdict[tuple[str, ...], set[Place]](set)
        for record in load_shipped(name):
            if text_hash_of(record.place.spec, record.config, gpu) == record.evidence.text:
                spec, evidence = record.place.spec, record.evidence
                places[evidence.triton, evidence.cuda, spec.public_op, spec.dtype].add(record.place)
        lines += [f"| {gpu.title} | {' | '.join(key)} | {len(places[key])} |" for key in sorted(places)]
    return "\n".join(lines)


# -- speedup.svg

BAR, GAP, LABEL, UNIT, TOP = 15, 4, 150, 115, 56  # pixels; UNIT is the length of a ratio of 1
PANEL = LABEL + int(2.4 * UNIT)
COLOUR = "#2f6f4f"


def chart() -> str:
    """How many times as long parallax-kernel takes: training steps, and decode."""
    training = ratios(
        rows_of("training_h200"), "batch, heads, seqlen, head_dim", "parallax-kernel step, ms", "step, ms"
    )
    decode = ratios(of_the_whole_model(rows_of("decode_h200")), SHAPE, CUTEDSL, OURS)
    left, height = panel(0, "Training step, causal: batch, heads, seqlen, head_dim", training)
    right, other = panel(PANEL + 30, "Decode, one query: batch, heads, keys, head_dim", decode)
    width, height = 2 * PANEL + 30, max(height, other) + 10
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(8, 18, "Time of parallax-kernel over time of parallax_gen (more than 1: parallax_gen is faster)", "bold"),
    ]
    return "\n".join([*head, *left, *right, "</svg>"]) + "\n"


def ratios(rows: list[Row], shape: str, theirs: str, ours: str) -> dict[str, float]:
    """The shape -> their time over ours, of the rows that have both."""
    return {row[shape]: float(row[theirs]) / float(row[ours]) for row in rows if row[theirs]}


def panel(x: int, title: str, bars: dict[str, float]) -> tuple[list[str], int]:
    """The lines of a bar chart, and where it ends."""
    lines, y, zero = [text(x + 8, 42, title)], TOP, x + LABEL
    for label, ratio in bars.items():
        length = round(ratio * UNIT)
        lines.append(text(zero - 6, y + 11, label, anchor="end"))
        lines.append(f'<rect x="{zero}" y="{y}" width="{length}" height="{BAR - 2}" fill="{COLOUR}"/>')
        lines.append(text(zero + length + 4, y + 11, f"{ratio:.2f}"))
        y += BAR + GAP
    at = zero + UNIT
    lines.append(f'<line x1="{at}" x2="{at}" y1="{TOP - 4}" y2="{y}" stroke="black" stroke-dasharray="3 3"/>')
    return lines, y


def text(x: int, y: int, content: str, weight: str = "normal", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-weight="{weight}" text-anchor="{anchor}">{escape(content)}</text>'


# -- README.md

TABLE_OF_CARDS = re.compile(r"^\| card \|.*\n(\|.*\n)+", flags=re.MULTILINE)
OLDEST_TRITON = (3, 5)  # pyproject.toml
TRITONS_OF_AMD = ("3.6", "3.9")  # with which kernels were compiled for AMD GPUs
TRITONS = [f"{OLDEST_TRITON[0]}.{minor}" for minor in range(OLDEST_TRITON[1], NEWEST_TESTED[1] + 1)]


def readme() -> str:
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    return TABLE_OF_CARDS.sub(lambda _: cards_table(), text)


def cards_table() -> str:
    """What calls get on each card, by Triton. Cards of a capability with equal cells share a row."""
    shipped = {name: current_places(name) for name in shipped_gpus()}
    columns = sorted({triton for counts in shipped.values() for triton in counts})
    others = [triton for triton in TRITONS if triton not in columns]
    groups: dict[tuple[str, ...], list[str]] = {}
    for gpu in sorted(GPUS.values(), key=lambda gpu: sort_key(gpu, shipped)):
        cells = [status(gpu, triton, shipped) for triton in columns]
        missing = ", ".join(triton for triton in others if not compiles(gpu, triton))
        cells.append(status(gpu, "", shipped) + (f", but not by {missing}" if missing else ""))
        own_row = gpu.name if gpu.name in shipped else ""
        groups.setdefault((own_row, gpu.gfx or ".".join(map(str, gpu.capability)), *cells), []).append(gpu.title)
    lines = [["card", "capability", *(f"Triton {triton}" for triton in columns), f"Triton {', '.join(others)}"]]
    lines += [["---"] * len(lines[0])]
    lines += [[", ".join(map(short, titles)), *cells] for (_, *cells), titles in groups.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sort_key(gpu: Gpu, shipped: dict[str, dict[str, int]]) -> tuple[object, ...]:
    return gpu.is_amd, not borrows(gpu, shipped), not shipped.get(gpu.name), gpu.capability, gpu.gfx


def current_places(name: str) -> dict[str, int]:
    """For each Triton, the number of kernels and sizes for which a card has shipped records of today's kernels."""
    places: dict[str, set[object]] = {}
    for record in load_shipped(name):
        if text_hash_of(record.place.spec, record.config, GPUS[name]) == record.evidence.text:
            places.setdefault(minor(record.evidence.triton), set()).add(record.place)
    return {triton: len(of) for triton, of in places.items()}


def status(gpu: Gpu, triton: str, shipped: dict[str, dict[str, int]]) -> str:
    if count := shipped.get(gpu.name, {}).get(triton):
        return f"measured: {count}"
    if gpu.is_amd and triton not in TRITONS_OF_AMD:
        return "untested"
    return "borrowed" if borrows(gpu, shipped) else "compiled"


def borrows(gpu: Gpu, shipped: dict[str, dict[str, int]]) -> bool:
    return any(shipped.get(name) for name in (gpu.name, *siblings(gpu)))


def compiles(gpu: Gpu, triton: str) -> bool:
    first = FIRST_TRITON.get(gpu.capability, OLDEST_TRITON)
    return tuple(map(int, triton.split("."))) >= first


def short(title: str) -> str:
    return title.removeprefix("NVIDIA ").removeprefix("GeForce ")


PAGES = {
    "README.md": readme,
    "cli.md": cli_page,
    "figures.md": figures_page,
    "release.md": release_page,
    "speedup.svg": chart,
}

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    for page, make in PAGES.items():
        to = DOCS.parent if page == "README.md" and folder == DOCS else folder
        (to / page).write_text(make(), encoding="utf-8")
