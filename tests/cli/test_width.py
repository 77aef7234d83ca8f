"""Every table at 80 columns, with the longest configs: nothing is wider, and no word is lost or broken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_samples import OTHER_TOOLCHAIN, make_record, run

from parallax_gen import describe
from parallax_gen.bench.parts import PARTS
from parallax_gen.bench.rows import Row
from parallax_gen.bench.summary import table_of
from parallax_gen.cli import COMMANDS
from parallax_gen.memory.gains import Comparison
from parallax_gen.memory.place import Place
from parallax_gen.memory.shipped import write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import OPS, KernelSpec
from parallax_gen.problem.workloads import TRAINING
from parallax_gen.report.shipping import CheckedCard
from parallax_gen.tables import Table, table_lines
from parallax_gen.tuning.borrowing import Summary
from parallax_gen.tuning.replay_tables import borrowing_tables

LONG = Bucket(2048, 131072, 131072)
WINDOWED = Bucket(2048, 131072, 131072, 32768)
ASKED = ("--gpu", "h200", "--shape", "256,128/8,131072")
STEP = ("--op", "training", "--window", "32768", *ASKED)
DECODE = ("--op", "decode", "--page-size", "128", "--cache-dtype", "e4m3", "--stats", "--window", "32768", *ASKED)


def spec_of(op: str) -> KernelSpec:
    """A spec with a long title."""
    if op == "decode_varlen":
        flags = {"causal": True, "window": True, "page_size": 128, "cache_dtype": "e4m3", "stats": True}
        return KernelSpec(op, 128, "bf16", group=16, **flags)  # type: ignore[arg-type]
    step = KernelSpec("forward", 128, "bf16", group=16, causal=True, stats=True, window=True)
    return KernelSpec("decode", 128, "bf16", group=16) if op == "decode" else step.for_op(op)


def place_of(op: str, gpu: str = "h200") -> Place:
    spec = spec_of(op)
    buckets = {"preprocess": Bucket(32768, 131072, 131072), "decode": Bucket(2048, 1, 131072)}
    buckets["decode_varlen"] = Bucket(2048, 1, 131072, 32768)
    return Place(gpu, spec, buckets.get(op, WINDOWED if spec.window else LONG))


def longest_config(spec: KernelSpec) -> KernelConfig:
    """The config with the longest short form."""
    op = op_of(spec)
    chosen = {knob.name: knob.values[0] for knob in op.knobs}
    for knob in op.knobs:
        chosen[knob.name] = max(knob.values, key=lambda v, name=knob.name: len(text_of(op.config, chosen | {name: v})))
    return op.config(**chosen)


def text_of(kind: type[KernelConfig], values: dict[str, object]) -> str:
    return describe.brief(kind(**values))


@pytest.fixture(autouse=True)
def one_more_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs may get another knob."""
    monkeypatch.setitem(describe._LETTERS, "num_stages", "tma s")


@pytest.fixture
def filled(store: Store) -> Store:
    for op in OPS:
        place = place_of(op)
        config = longest_config(place.spec)
        resources = {"registers": 255, "spills": 12345, "shared_bytes": 232448, "error": 1.23e-3}
        store.save(make_record(1234567.8, place=place, config=config, evidence_changes=OTHER_TOOLCHAIN, **resources))
        store.save(make_record(123456.7, place=place_of(op, "h100"), config=config, **resources))
        detail = "spills 900 bytes per thread, over 512, as the compiler said " * 3
        store.save(make_record(None, "resources", place=place, config=config, detail=detail.strip(), **resources))
    return store


def words_of(text: str) -> list[str]:
    return sorted(re.sub(r"\d+", "0", text).split())  # doctor prints how long it took


def check(*arguments: object) -> str:
    """Check what a command prints on both streams. Long words, such as paths, stand on lines of their own."""
    narrow, wide = (run(*arguments, env={"COLUMNS": columns}) for columns in ("80", "1000"))
    assert narrow.exit_code == wide.exit_code == 0, narrow.output
    for text, whole in ((narrow.stdout, wide.stdout), (narrow.stderr, wide.stderr)):
        assert words_of(text) == words_of(whole)
        too_long = [line for line in text.splitlines() if len(line) > 80]
        assert [line for line in too_long if max(map(len, line.split())) < 60] == []
    return narrow.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("list", "--all"),
        ("list", "--summary"),
        ("list", "--op", "training", "--tier", "toolchain"),
        ("list", "--gpu", "h200", "--for", "training", "--heads", "128/8", "--window", "32768"),
        ("show", *STEP),
        ("show", *DECODE),
        ("explain", *STEP),
        ("explain", *DECODE),
        (
            "explain",
            "--gpu",
            "h200",
            "--for",
            "serving",
            "--heads",
            "128/8",
            "--max-len",
            "131072",
            "--window",
            "32768",
        ),
        ("db", "stats"),
        ("db", "check"),
        ("doctor",),
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_what_commands_print_fits(arguments: tuple[str, ...], filled: Store) -> None:
    write_shipped([r for r in filled.all() if r.place.gpu == "h100" and r.measured], "h100")
    check(*arguments)


def test_what_tune_prints_fits(fake_h200: None, store: Store) -> None:
    sizes = ("--shape", "256,128/8,131072", "--window", "32768", "--trials", "3", "--workers", "1")
    for arguments in (("--op", "training", *sizes), ("--op", "decode", "--page-size", "16", "--stats", *sizes)):
        done = run("tune", *arguments, env={"COLUMNS": "80"})
        assert done.exit_code == 0, done.output
        assert max(map(len, done.stdout.splitlines()[:-1])) <= 80  # the last one is a path
        assert "tma" in done.stdout.split()


def test_files_and_long_provenance_fit(filled: Store, tmp_path: Path) -> None:
    check("export", *STEP, "-o", tmp_path / "kernels")


def test_other_tables_fit(filled: Store) -> None:
    summary = Summary("decode, per-sequence lengths, paged", "another toolchain", 1234, 1234, 1.0, 12.3, 12.3, 12.3)
    tables = borrowing_tables([summary])
    records = [r for r in filled.all("h200") if r.measured]
    comparisons = [(Comparison(r.place, r, r), "slower than the default") for r in records]
    tables.append(CheckedCard("h200", 1, 1, comparisons).table())
    for op in ("decode", TRAINING):
        names = ("parallax_gen", "parallax-kernel CuTeDSL", "parallax-kernel Triton")
        shape = Shape(1, 8, 8, 131072, 131072)
        rows = [
            Row(name, op, part, spec_of("forward"), shape, 123456.7, 1234.5, 1.2e-3, peaked_error=1.2e-3)
            for name in names
            for part in PARTS[op]
        ]
        tables.append(Table("", *table_of(rows), right=table_of(rows).columns[1:]))
    for table in tables:
        lines = table_lines(table, 80)
        assert max(map(len, lines)) <= 80
        words = sorted(word for row in (table.columns, *table.lines) for cell in row for word in cell.split())
        assert sorted(" ".join(lines).split()) == words


def test_help_fits() -> None:
    for command in COMMANDS:
        assert max(map(len, run(command, "--help", env={"COLUMNS": "80"}).stdout.splitlines())) <= 80


def test_the_longest_configs_are_folded_between_words(filled: Store) -> None:
    text = check("list", "--gpu", "h200", "--op", "dkdv")
    config = describe.brief(longest_config(spec_of("dkdv")))
    assert "tma" in config.split()
    row, *_ = text.partition("config  ")[2].partition("\n\n")
    for word in config.split():
        assert re.search(rf"(^|\s){re.escape(word)}(\s|$)", row)
