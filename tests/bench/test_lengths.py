"""`bench --lengths` and repeated `--page-size`: their parsing, the timed cases, and the rows and titles."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from cli_samples import run, run_json

from parallax_gen.bench import compare as comparing
from parallax_gen.bench.cases import QUICK_SHAPES, Lengths
from parallax_gen.bench.rows import Effort, Row
from parallax_gen.describe import lengths_from_text, lengths_to_text, with_lengths
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

SHAPE = Shape(8, 32, 8, 1, 4096)
SKEWED = (4096, *[128] * 7)
BENCH = ("bench", "--only", "parallax_gen", "--shape", "8,32/8,4096")

Compared = tuple[KernelSpec, Shape, tuple[int, ...]]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Compared]:
    """Replace the timing: records each comparison, and every one takes 10 us."""
    compared: list[Compared] = []

    def compare(
        op: str, spec: KernelSpec, shape: Shape, only: tuple[str, ...], effort: Effort, lengths: tuple[int, ...]
    ) -> list[Row]:
        compared.append((spec, shape, lengths))
        return [Row(name, op, op, spec, shape, 10.0, 1.0, lengths=lengths) for name in only]

    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: gpu_by_name("h200"))
    monkeypatch.setattr(comparing, "compare", compare)
    return compared


# parsing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096,128,128,128,128,128,128,128", SKEWED),
        ("4096, 7x128", SKEWED),
        ("skewed", SKEWED),
        ("spread", tuple(round(2 ** (12 - 5 * i / 7)) for i in range(8))),
        ("7x4096,1", (*[4096] * 7, 1)),
        ("8x9", (9,) * 8),  # in larger caches
        ("8x4096", ()),
    ],
)
def test_lengths_of_a_shape_are_parsed(text: str, expected: tuple[int, ...]) -> None:
    assert Lengths.parse(text).of(SHAPE) == expected


def test_a_named_batch_of_one_sequence_has_all_keys() -> None:
    assert [Lengths(pattern=name).of(Shape(1, 8, 8, 1, 4096)) for name in ("spread", "skewed")] == [(), ()]


@pytest.mark.parametrize("lengths", [(), (5,), (5, 5), SKEWED, (1, 2, 2, 1), (7, 11, 11, 11)])
def test_lengths_round_trip_through_text(lengths: tuple[int, ...]) -> None:
    assert lengths_from_text(lengths_to_text(lengths)) == lengths


def test_a_title_is_short() -> None:
    assert with_lengths(SHAPE, ()) == str(SHAPE)
    assert with_lengths(SHAPE, SKEWED) == f"{SHAPE}, lengths 4096,7x128"
    assert with_lengths(SHAPE, range(1, 4097)) == f"{SHAPE}, lengths 1 to 4096, 2048 on average"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--lengths", "4096,,128"),
            "--lengths': '4096,,128' is not a list of keys per sequence, 1 or more each, such as",
        ),
        (("--lengths", "0,7x128"), "--lengths': '0,7x128' is not a list of keys per"),
        (("--lengths", "even"), "--lengths': 'even' is not a list of keys per"),
        (("--lengths", ""), "--lengths': '' is not a list of keys per"),
        (("--lengths", "4096,6x128"), "--lengths: 7 sequences of up to 4096 keys do not fit --shape batch 8"),
        (("--lengths", "7x128,4097"), "--lengths: 8 sequences of up to 4097 keys do not fit --shape batch 8"),
        (("--lengths", "99999999999x1"), "--lengths: 99999999999 sequences of up to 1 keys do not"),
        (("--lengths", "spread", "--op", "forward"), "--lengths needs --op decode, and no --host"),
        (("--lengths", "spread", "--op", "decode", "--op", "training"), "--lengths needs --op decode"),
        (("--lengths", "spread", "--host"), "--lengths needs --op decode, and no --host"),
        (("--page-size", "-1"), "--page-size': -1 is not in the range x>=0"),
        (
            ("--page-size", "0", "--page-size", "16", "--op", "forward"),
            "--page-size needs --op decode, not forward",
        ),
    ],
)
def test_invalid_lengths_are_one_usage_error_that_names_the_option(
    compared: list[Compared], options: tuple[str, ...], message: str
) -> None:
    done = run(*BENCH, *options)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert done.stderr.count("error: ") == 1
    assert compared == []


# timed cases


def test_a_batch_of_lengths_is_decode_varlen(compared: list[Compared], tmp_path: Path) -> None:
    arguments = (*BENCH, "--lengths", "4096,7x128", "--csv", tmp_path / "rows")
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert compared == [(KernelSpec("decode_varlen", 128, "bf16", 4), SHAPE, SKEWED)]
    title = "decode, head_dim 128, bf16, GQA 4:1, per-sequence lengths: "
    title += "batch 8, heads 32/8, seqlen 1x4096, lengths 4096,7x128"
    assert done.stdout.splitlines()[0] == title
    with (tmp_path / "rows").open(newline="", encoding="utf-8") as file:
        assert [(row["ragged"], row["lengths"]) for row in csv.DictReader(file)] == [("True", "4096,7x128")]
    assert run(*arguments).stdout == done.stdout
    assert [row["lengths"] for row in run_json(*BENCH, "--lengths", "skewed")["rows"]] == ["4096,7x128"]


def test_other_lengths_are_timed_and_added_to_the_csv(compared: list[Compared], tmp_path: Path) -> None:
    for options in (("--lengths", "skewed"), ("--lengths", "spread"), ("--op", "decode", "--ragged")):
        run(*BENCH, *options, "--csv", tmp_path / "rows")
    assert len(compared) == len(set(compared)) == 3
    for options in (
        ("--lengths", "4096,7x128"),
        ("--lengths", "8x4096"),
    ):  # the first and the third, spelled differently
        run(*BENCH, *options, "--csv", tmp_path / "rows")
    assert len(compared) == 3


def test_a_named_batch_applies_to_every_shape_of_a_grid(compared: list[Compared]) -> None:
    run("bench", "--grid", "paper", "--lengths", "skewed", "--only", "parallax_gen")
    assert {spec.op for spec, _, _ in compared} == {"decode_varlen"}
    for _, shape, lengths in compared:
        expected = (shape.seqlen_kv, *[shape.seqlen_kv // 32] * (shape.batch - 1)) if shape.batch > 1 else ()
        assert lengths == expected


# layouts of the cache


def test_each_shape_is_timed_with_each_page_size_in_turn(compared: list[Compared]) -> None:
    sizes = ("--page-size", "0", "--page-size", "16", "--page-size", "64", "--page-size", "16")
    run(*BENCH, "--shape", "1,8,1024", "--ragged", "--op", "decode", *sizes)
    assert [(shape.batch, spec.page_size) for spec, shape, _ in compared] == [
        (batch, page_size) for batch in (8, 1) for page_size in (0, 16, 64)
    ]
    assert all(spec.op == "decode_varlen" for spec, _, _ in compared)
    compared.clear()
    run(*BENCH, "--page-size", "16", "--op", "decode")
    run(*BENCH, "--op", "decode")
    assert [spec.page_size for spec, _, _ in compared] == [16, 0]


def test_quick_keeps_all_page_sizes_of_a_shape(compared: list[Compared]) -> None:
    run("bench", "--grid", "serving", "--ragged", "--quick", "--page-size", "0", "--page-size", "16")
    assert len({shape for _, shape, _ in compared}) == QUICK_SHAPES
    assert [spec.page_size for spec, _, _ in compared] == [0, 16] * QUICK_SHAPES
