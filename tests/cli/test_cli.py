"""What all commands have in common: help that is quick, errors of one line, and what the machine is fit for."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from cli_samples import CALL, OTHER_KERNEL, OTHER_TOOLCHAIN, PLACE, known, run, run_json
from cli_samples import process as python

import parallax_gen.cli
from parallax_gen.cli.options import KernelArgs, check_flags, chosen_gpu, parse_sizes
from parallax_gen.errors import UnknownGpuError
from parallax_gen.memory.old import spec_from
from parallax_gen.memory.shipped import write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import FAMILIES, KernelSpec
from parallax_gen.problem.workloads import TRAINING, Flags

COMMANDS = (
    *("tune", "list", "show", "explain", "render", "export", "bench", "report", "ship", "db", "doctor", "completion"),
    *("sweep", "replay"),
)


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from click.testing import CliRunner
from parallax_gen.cli import COMMANDS, main
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in main.list_commands(None))):
    assert CliRunner().invoke(main, arguments).exit_code == 0, arguments
print([name for name in ("torch", "triton", "numpy", "optuna", "sqlite_utils", "jinja2") if name in sys.modules])
"""
    out, err = python("-c", code).communicate(timeout=60)
    assert out.strip() == "[]", err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_parses(command: str) -> None:
    text = run(command, "--help").output
    assert "Example\n    parallax-gen " + command in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_command_whose_file_is_missing_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parallax_gen.cli.COMMANDS, "gone", "parallax_gen.cli.gone:gone")
    assert "gone" not in run("--help").output
    assert run("gone").exit_code == 2


def test_errors_are_one_line_in_a_real_process() -> None:
    child = python("-m", "parallax_gen.cli", "list", "--gpu", "h2000")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (1, "")
    assert err.startswith("error: unknown GPU 'h2000'; known are ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("variable", ["PARALLAX_GEN_QUIET", "PARALLAX_GEN_STRICT"])
def test_a_switch_that_is_neither_on_nor_off_is_an_error_of_one_line(variable: str) -> None:
    result = run("list", env={variable: "2"})
    assert (result.exit_code, result.stdout) == (1, "")
    told = f"error: {variable}: got '2'; allowed: 1, true, yes, on for on; 0, false, no, off for off"
    assert result.stderr == f"{told}\n"
    assert run("list", env={variable: "TRUE"}).exit_code == 0
    assert run("--help", env={variable: "2"}).exit_code == 0


def test_a_database_that_cannot_be_used_is_an_error_of_one_line(store: Store) -> None:
    store.close()
    store.path.write_text("not a database, but long enough to be taken for one by SQLite" * 20, encoding="utf-8")
    result = run("list")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {store.path} is damaged")
    assert result.stderr.count("\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("parallax_gen.memory.standing.open_memory", fail)
    assert isinstance(run("list").exception, ZeroDivisionError)


@pytest.mark.parametrize("arguments", [("--op", "backward"), ("--shape", "4,16"), ("--dtype", "int8"), ("--nonsense",)])
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    result = run("explain", *CALL, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_without_a_gpu_one_must_be_named() -> None:
    result = run("explain", *CALL[2:])
    assert result.exit_code == 1
    assert result.stderr == "error: there is no CUDA device here: name a GPU, such as --gpu h200\n"


def test_a_card_that_the_table_does_not_hold_goes_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    card = replace(gpu_by_name("h100"), name="nvidia-h100-mig-16sm")
    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: card)
    assert chosen_gpu(None) == chosen_gpu(card.name) == card
    with pytest.raises(UnknownGpuError, match="unknown GPU"):
        chosen_gpu("nvidia-h100-mig-32sm")


# --shape and the kernel


@pytest.mark.parametrize(
    ("text", "op", "shape"),
    [
        ("4,16,4096", "forward", Shape(4, 16, 16, 4096, 4096)),
        ("4,16,4096", "decode", Shape(4, 16, 16, 1, 4096)),
        ("1,32/8,128x4096", "forward", Shape(1, 32, 8, 128, 4096)),
        (" 1, 32/8, 1x4096 ", "decode", Shape(1, 32, 8, 1, 4096)),
        ("8,32/8,4x4096", "decode", Shape(8, 32, 8, 4, 4096)),
        ("1,8/8,1x7", "forward", Shape(1, 8, 8, 1, 7)),
    ],
)
def test_shapes_are_read(text: str, op: str, shape: Shape) -> None:
    assert parse_sizes(text).for_op(op) == shape


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("4,16", "is not batch,heads,seqlen"),
        ("4,16,4096,1", "is not batch,heads,seqlen"),
        ("a,16,4096", "is not batch,heads,seqlen"),
        ("4,16,-1", "is not batch,heads,seqlen"),
        ("4,32/5,64", "a multiple of kv_heads"),
        ("4,32/0,64", "kv_heads: got 0"),
        ("0,32,64", "batch: got 0"),
        ("1,32,0x64", "seqlen_q: got 0"),
    ],
)
def test_a_malformed_shape_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(click.BadParameter, match=says):
        parse_sizes(text)


def test_the_kernel_that_is_asked_for() -> None:
    sizes = parse_sizes("2,32/8,4096")
    spec, shape = KernelArgs("forward", 64, "fp16").kernel(sizes)
    assert spec.causal
    assert (spec.group, shape) == (4, Shape(2, 32, 8, 4096, 4096))
    assert not KernelArgs("forward", 64, "fp16", Flags(causal=False)).kernel(sizes)[0].causal
    spec, shape = KernelArgs("decode", 64, "fp16").kernel(sizes)
    assert not spec.causal
    assert shape == Shape(2, 32, 8, 1, 4096)
    spec, shape = KernelArgs("decode", 96, "tf32").kernel(parse_sizes("2,32/8,16x4096"))
    assert (spec.many_queries, spec.causal, spec.op) == (True, True, "decode_varlen")
    assert shape == Shape(2, 32, 8, 16, 4096)
    assert not KernelArgs("decode", 96, "tf32", Flags(causal=False)).kernel(parse_sizes("2,32/8,16x4096"))[0].causal
    spec, shape = KernelArgs("dkdv", 72, "tf32", Flags(window=100, varlen=True)).kernel(sizes)
    assert (spec.window, spec.varlen, spec.stats, shape.window) == (True, True, False, 100)
    spec, shape = KernelArgs("preprocess", 72, "fp32").kernel(sizes)
    assert (spec.group, shape) == (1, Shape(2, 32, 32, 4096, 4096))  # it sees rows alone
    for op in FAMILIES:
        assert KernelArgs(op, 64, "bf16").kernel(None)[0].op == op  # of the first usual shape


@pytest.mark.parametrize(
    ("flags", "ops", "says"),
    [
        (
            ("--full",),
            ("preprocess",),
            "--causal and --full: only with --op forward or dkdv or dqdr or decode or training, not with preprocess",
        ),
        (("--stats",), ("dkdv",), "--stats: only with --op forward or decode, not with dkdv"),
        (("--ragged",), ("forward",), "--ragged: only with --op decode, not with forward"),
        (("--page-size", "16"), ("forward",), "--page-size: only with --op decode, not with forward"),
        (("--page-size", "0"), ("decode",), "0 is not in the range x>=1"),
        (("--leftpad",), ("forward",), "--leftpad: only with --op decode, not with forward"),
        (("--cache-dtype", "e4m3"), ("dkdv",), "--cache-dtype: only with --op decode, not with dkdv"),
        (("--cache-dtype", "fp8"), ("decode",), "'fp8' is not one of 'e4m3', 'e5m2'"),
        (("--window", "9"), ("preprocess",), "--window: only with --op"),
        (("--window", "0"), ("forward",), "0 is not in the range x>=1"),
        (("--head-dim", "100"), ("forward",), "100 is not a multiple of 8 from 8 to 256"),
        (("--head-dim", "264"), ("dqdr",), "264 is not a multiple of 8 from 8 to 256"),
        (("--head-dim", "wide"), ("dqdr",), "'wide' is not a valid integer"),
    ],
)
def test_a_flag_of_other_ops_is_a_usage_error(flags: tuple[str, ...], ops: tuple[str, ...], says: str) -> None:
    for command in (("explain", "--shape", "1,8,1024"), ("tune",)):
        result = run(*command, "--gpu", "h200", "--op", *ops, *flags)
        assert result.exit_code == 2
        assert says in " ".join(result.stderr.split())


def test_what_a_kernel_cannot_be_is_said_of_ops_that_the_command_takes() -> None:
    words = ("--gpu", "h200", "--op", "decode", "--cache-dtype", "e4m3", "--dtype", "fp32", "--shape", "1,32/8,4096")
    result = run("explain", *words)
    assert result.exit_code
    assert "cache_dtype: got e4m3; allowed: '', but with ragged decode and dtype bf16 or fp16" in result.stderr


def test_a_flag_that_one_of_several_ops_has_is_none() -> None:
    check_flags(Flags(causal=False, stats=True, window=9, varlen=True, ragged=True), ("forward", "decode"))
    check_flags(Flags(leftpad=True, page_size=16, cache_dtype="e4m3"), ("forward", "decode"))
    check_flags(Flags(causal=True, window=9, varlen=True), (TRAINING,))
    with pytest.raises(click.UsageError, match="--stats"):
        check_flags(Flags(stats=True), (TRAINING,))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--op", "preprocess", "--dtype", "tf32"), "error: dtype: got 'tf32'"),
        (("--op", "decode", "--dtype", "fp32", "--cache-dtype", "e4m3"), "error: cache_dtype: got e4m3"),
        (("--op", "dkdv", "--full", "--window", "9"), "error: window: got True without causal"),
    ],
)
def test_a_kernel_that_cannot_be_is_an_error_of_one_line(arguments: tuple[str, ...], says: str) -> None:
    result = run("explain", "--gpu", "h200", "--shape", "1,8,1024", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(says)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("shape", "options", "says", "expected"),
    [
        ("8,32/8,4096", ("--leftpad",), "GQA 4:1, ragged, leftpad", {"leftpad": True}),
        ("8,32/8,4096", ("--stats",), "GQA 4:1, stats, ragged", {"stats": True}),
        (
            "8,32/8,4096",
            ("--page-size", "16", "--cache-dtype", "e4m3"),
            "GQA 4:1, ragged, pages of 16, e4m3 cache",
            {"page_size": 16, "cache_dtype": "e4m3"},
        ),
        (
            "8,32/8,4x4096",
            ("--window", "100", "--varlen"),
            "GQA 4:1, window, varlen, ragged, many queries",
            {"causal": True, "window": True, "varlen": True, "many_queries": True},
        ),
        ("8,32/8,4x4096", ("--full",), "GQA 4:1, full, ragged, many queries", {"many_queries": True}),
    ],
)
def test_options_of_decode(shape: str, options: tuple[str, ...], says: str, expected: dict[str, object]) -> None:
    spec = KernelSpec("decode_varlen", 96, "bf16", 4, **expected)  # type: ignore[arg-type]
    asked = ("--gpu", "h200", "--op", "decode", "--head-dim", "96", "--shape", shape, *options)
    assert spec_from(run_json("explain", *asked)["spec"]) == spec
    assert f"decode, head_dim 96, bf16, {says}" in run("show", *asked).output


# doctor


def test_doctor_finds_nothing_broken() -> None:
    report = run_json("doctor")
    assert not report["broken"]
    found = {finding["check"]: finding for finding in report["findings"]}
    assert list(found) == ["versions", "device", "cache", "database", "records", "cuobjdump", "compile"]
    assert found["device"]["status"] == "note"
    assert "a small kernel for h100" in found["compile"]["text"]


def test_doctor_says_what_is_broken(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallax_gen.cli import doctor

    def nothing_compiles() -> None:
        raise ImportError("no module named triton")

    monkeypatch.setitem(doctor.CHECKS, "compile", nothing_compiles)  # type: ignore[arg-type]
    store.close()
    store.path.write_bytes(b"\0" * 5000)
    result = run("doctor")
    assert result.exit_code == 1
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert lines["compile"].split(maxsplit=2)[1:] == ["broken", "no module named triton"]
    assert lines["database"].split()[1] == "broken"
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["broken"]


def test_doctor_makes_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallax_gen.cli import doctor

    path = tmp_path / "new" / "folder" / "tuning.db"
    monkeypatch.setenv("PARALLAX_GEN_DB", str(path))
    monkeypatch.delitem(doctor.CHECKS, "compile")
    assert "not yet created" in run("doctor").stdout
    assert not path.parent.exists()


def test_doctor_says_what_records_count_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from parallax_gen.cli import doctor

    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in ("database", "records")})
    store.merge([known(), known(splits=3, unlike=OTHER_KERNEL), known(splits=3, unlike=OTHER_TOOLCHAIN)])
    found = {finding["check"]: finding["text"] for finding in run_json("doctor")["findings"]}
    assert found["database"].endswith(": 3 rows, 1 of today's kernels and this toolchain")
    assert found["records"] == (
        "h200: 1 kernels and sizes in your database and the shipped records; configs of calls come from this Triton: 1"
    )
    longer, wider = (replace(PLACE, bucket=Bucket(rows, 1, 8192)) for rows in (1024, 4096))  # none near another
    folder = store.path.parent / "shipped"
    write_shipped(
        [known(unlike=OTHER_TOOLCHAIN, place=longer), known(unlike=OTHER_KERNEL, place=wider)], "h200", folder
    )
    monkeypatch.setattr("parallax_gen.files.data_dir", lambda name: folder)  # which the check looks into
    store.save(known(place=replace(PLACE, gpu="a100")))  # of which nothing ships
    found = [finding["text"] for finding in run_json("doctor")["findings"] if finding["check"] == "records"]
    counted = "kernels and sizes in your database and the shipped records; configs of calls come from"
    assert found == [
        f"a100: 1 {counted} this Triton: 1",
        f"h200: 3 {counted} this Triton: 1, Triton 3.5 (not yet checked): 1, the default: 1",
    ]
    store.save(known(place=longer))
    found = [finding["text"] for finding in run_json("doctor")["findings"] if finding["check"] == "records"]
    assert found[1] == f"h200: 3 {counted} this Triton: 2, the default: 1"
    broken = store.path.with_name("broken.db")
    broken.write_bytes(b"\0" * 5000)
    monkeypatch.setenv("PARALLAX_GEN_DB", str(broken))
    findings = json.loads(run("doctor", "--json").stdout)["findings"]
    assert [(f["check"], f["status"]) for f in findings] == [("database", "broken"), ("records", "ok")]
    assert findings[1]["text"] == (
        "h200: 2 kernels and sizes in only the shipped records; configs of calls come from "
        "Triton 3.5 (not yet checked): 1, the default: 1"
    )
