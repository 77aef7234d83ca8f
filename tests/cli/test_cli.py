"""What all commands share: quick help and one-line errors; and `doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from cli_samples import CALL, OTHER_KERNEL, OTHER_TOOLCHAIN, PLACE, make_record, run, run_json
from cli_samples import start_python as python

import parallax_gen.cli
from parallax_gen.cli.options import KernelArgs, check_flags, chosen_gpu, parse_sizes
from parallax_gen.errors import UnknownGpuError
from parallax_gen.memory.old import spec_from
from parallax_gen.memory.shipped import write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import PUBLIC_OPS, KernelSpec
from parallax_gen.problem.workloads import TRAINING, Flags, Sizes

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


def test_a_command_without_its_file_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parallax_gen.cli.COMMANDS, "gone", "parallax_gen.cli.gone:gone")
    assert "gone" not in run("--help").output
    assert run("gone").exit_code == 2


def test_errors_are_one_line_in_a_real_process() -> None:
    child = python("-m", "parallax_gen.cli", "list", "--gpu", "h2000")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (2, "")
    assert err.startswith("error: unknown GPU 'h2000'; known GPUs: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("variable", ["PARALLAX_GEN_QUIET", "PARALLAX_GEN_STRICT"])
def test_an_invalid_switch_is_a_one_line_error(variable: str) -> None:
    result = run("list", env={variable: "2"})
    assert (result.exit_code, result.stdout) == (2, "")
    message = f"error: {variable}: got '2'; allowed: 1, true, yes, on for on; 0, false, no, off for off"
    assert result.stderr == f"{message}\n"
    assert run("list", env={variable: "TRUE"}).exit_code == 0
    assert run("--help", env={variable: "2"}).exit_code == 0


def test_an_unusable_database_is_a_one_line_error(store: Store) -> None:
    store.close()
    store.path.write_text("not a database, but long enough to be taken for one by SQLite" * 20, encoding="utf-8")
    result = run("list")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {store.path} is damaged")
    assert result.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("parallax_gen.memory.descriptions.open_memory", fail)
    assert isinstance(run("list").exception, ZeroDivisionError)


@pytest.mark.parametrize("arguments", [("--op", "backward"), ("--shape", "4,16"), ("--dtype", "int8"), ("--nonsense",)])
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    result = run("explain", *CALL, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_without_a_gpu_the_option_gpu_is_required() -> None:
    result = run("explain", *CALL[2:])
    assert result.exit_code == 2
    assert result.stderr == "error: there is no CUDA device here: name a GPU, such as --gpu h200\n"


def test_an_unknown_card_keeps_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
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
    sizes = parse_sizes(text)
    assert sizes.for_op(op) == shape
    assert parse_sizes(str(sizes)) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
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
def test_a_malformed_shape_is_explained(text: str, message: str) -> None:
    with pytest.raises(click.BadParameter, match=message):
        parse_sizes(text)


def kernel_of(asked: KernelArgs, sizes: Sizes | None) -> tuple[KernelSpec, Shape]:
    (call,) = asked.step(sizes).calls
    return call.spec, call.shape


def test_options_select_the_kernel() -> None:
    sizes = parse_sizes("2,32/8,4096")
    spec, shape = kernel_of(KernelArgs("forward", 64, "fp16"), sizes)
    assert spec.causal
    assert (spec.group, shape) == (4, Shape(2, 32, 8, 4096, 4096))
    assert not kernel_of(KernelArgs("forward", 64, "fp16", Flags(causal=False)), sizes)[0].causal
    spec, shape = kernel_of(KernelArgs("decode", 64, "fp16"), sizes)
    assert not spec.causal
    assert shape == Shape(2, 32, 8, 1, 4096)
    spec, shape = kernel_of(KernelArgs("decode", 96, "tf32"), parse_sizes("2,32/8,16x4096"))
    assert (spec.multi_token, spec.causal, spec.op) == (True, True, "decode_varlen")
    assert shape == Shape(2, 32, 8, 16, 4096)
    assert not kernel_of(KernelArgs("decode", 96, "tf32", Flags(causal=False)), parse_sizes("2,32/8,16x4096"))[0].causal
    spec, shape = kernel_of(KernelArgs("dkdv", 72, "tf32", Flags(window=100, varlen=True)), sizes)
    assert (spec.window, spec.varlen, spec.stats, shape.window) == (True, True, False, 100)
    spec, shape = kernel_of(KernelArgs("preprocess", 72, "fp32"), sizes)
    assert (spec.group, shape) == (1, Shape(2, 32, 32, 4096, 4096))  # preprocess depends on rows only
    for op in PUBLIC_OPS:
        assert kernel_of(KernelArgs(op, 64, "bf16"), None)[0].op == op  # the first usual shape


@pytest.mark.parametrize(
    ("flags", "ops", "message"),
    [
        (
            ("--full",),
            ("preprocess",),
            "--causal or --full needs --op forward or dkdv or dqdr or decode",
        ),
        (("--stats",), ("dkdv",), "--stats needs --op forward or decode, not dkdv"),
        (("--ragged",), ("forward",), "--ragged needs --op decode, not forward"),
        (("--page-size", "16"), ("forward",), "--page-size needs --op decode, not forward"),
        (("--page-size", "0"), ("decode",), "0 is not in the range x>=1"),
        (("--leftpad",), ("forward",), "--leftpad needs --op decode, not forward"),
        (("--cache-dtype", "e4m3"), ("dkdv",), "--cache-dtype needs --op decode, not dkdv"),
        (("--cache-dtype", "fp8"), ("decode",), "'fp8' is not one of 'e4m3', 'e5m2'"),
        (("--window", "9"), ("preprocess",), "--window needs --op"),
        (("--window", "0"), ("forward",), "0 is not in the range x>=1"),
        (("--head-dim", "100"), ("forward",), "100 is not a multiple of 8 from 8 to 256"),
        (("--head-dim", "264"), ("dqdr",), "264 is not a multiple of 8 from 8 to 256"),
        (("--head-dim", "wide"), ("dqdr",), "'wide' is not a valid integer"),
    ],
)
def test_a_flag_of_other_ops_is_a_usage_error(flags: tuple[str, ...], ops: tuple[str, ...], message: str) -> None:
    for command in (("explain", "--shape", "1,8,1024"), ("tune",)):
        result = run(*command, "--gpu", "h200", "--op", *ops, *flags)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())


def test_invalid_flags_are_explained_for_the_ops_of_the_command() -> None:
    arguments = (
        "--gpu",
        "h200",
        "--op",
        "decode",
        "--cache-dtype",
        "e4m3",
        "--dtype",
        "fp32",
        "--shape",
        "1,32/8,4096",
    )
    result = run("explain", *arguments)
    assert result.exit_code
    allowed = "'', except for decode with per-sequence lengths, in bf16 or fp16"
    assert f"cache_dtype: got e4m3; allowed: {allowed}" in result.stderr


def test_a_flag_of_one_of_several_ops_is_no_error() -> None:
    check_flags(
        Flags(causal=False, stats=True, window=9, varlen=True, per_sequence_lengths=True), ("forward", "decode")
    )
    check_flags(Flags(leftpad=True, page_size=16, cache_dtype="e4m3"), ("forward", "decode"))
    check_flags(Flags(causal=True, window=9, varlen=True), (TRAINING,))
    with pytest.raises(click.UsageError, match="--stats"):
        check_flags(Flags(stats=True), (TRAINING,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "preprocess", "--dtype", "tf32"), "error: dtype: got 'tf32'"),
        (("--op", "decode", "--dtype", "fp32", "--cache-dtype", "e4m3"), "error: cache_dtype: got e4m3"),
        (("--op", "dkdv", "--full", "--window", "9"), "error: window: got True without causal"),
    ],
)
def test_an_invalid_kernel_is_a_one_line_error(arguments: tuple[str, ...], message: str) -> None:
    result = run("explain", "--gpu", "h200", "--shape", "1,8,1024", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("shape", "options", "message", "expected"),
    [
        ("8,32/8,4096", ("--leftpad",), "GQA 4:1, per-sequence lengths, leftpad", {"leftpad": True}),
        ("8,32/8,4096", ("--stats",), "GQA 4:1, stats, per-sequence lengths", {"stats": True}),
        (
            "8,32/8,4096",
            ("--page-size", "16", "--cache-dtype", "e4m3"),
            "GQA 4:1, per-sequence lengths, pages of 16, e4m3 cache",
            {"page_size": 16, "cache_dtype": "e4m3"},
        ),
        (
            "8,32/8,4x4096",
            ("--window", "100", "--varlen"),
            "GQA 4:1, window, varlen, per-sequence lengths, multi-token queries",
            {"causal": True, "window": True, "varlen": True, "multi_token": True},
        ),
        (
            "8,32/8,4x4096",
            ("--full",),
            "GQA 4:1, full, per-sequence lengths, multi-token queries",
            {"multi_token": True},
        ),
    ],
)
def test_options_of_decode(shape: str, options: tuple[str, ...], message: str, expected: dict[str, object]) -> None:
    spec = KernelSpec("decode_varlen", 96, "bf16", 4, **expected)  # type: ignore[arg-type]
    arguments = ("--gpu", "h200", "--op", "decode", "--head-dim", "96", "--shape", shape, *options)
    assert spec_from(run_json("explain", *arguments)["spec"]) == spec
    assert f"decode, head_dim 96, bf16, {message}" in run("show", *arguments).output


# doctor


def test_doctor_on_a_sound_machine() -> None:
    report = run_json("doctor")
    assert not report["broken"]
    result = {finding["check"]: finding for finding in report["findings"]}
    assert list(result) == ["versions", "device", "cache", "database", "records", "lock", "cuobjdump", "compile"]
    assert result["device"]["status"] == "note"
    assert "a small kernel for h100" in result["compile"]["text"]


def test_doctor_reports_what_is_broken(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_doctor_names_the_card_and_a_triton_that_is_too_old_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from parallax_gen.cli import doctor
    from parallax_gen.codegen import device
    from parallax_gen.memory import toolchain

    monkeypatch.setattr(doctor, "CHECKS", {"device": doctor.CHECKS["device"]})
    monkeypatch.setattr(device, "gpu_here", lambda index: gpu_by_name("gb10"))
    for version, broken in (("3.6.0", False), ("3.5.1", True)):
        monkeypatch.setattr(toolchain, "triton_version", lambda version=version: version)
        report = json.loads(run("doctor", "--json").stdout)
        texts = [finding["text"] for finding in report["findings"]]
        assert texts[0] == "NVIDIA GB10, recognised as gb10 (in the table of GPUs)"
        assert report["broken"] == broken == ("install 3.6 or newer" in texts[-1])


def test_doctor_creates_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallax_gen.cli import doctor

    path = tmp_path / "new" / "folder" / "tuning.db"
    monkeypatch.setenv("PARALLAX_GEN_DB", str(path))
    monkeypatch.delitem(doctor.CHECKS, "compile")
    assert "not yet created" in run("doctor").stdout
    assert not path.parent.exists()


def test_doctor_counts_places_by_tier(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from parallax_gen.cli import doctor

    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in ("database", "records")})
    store.merge(
        [
            make_record(),
            make_record(splits=3, evidence_changes=OTHER_KERNEL),
            make_record(splits=3, evidence_changes=OTHER_TOOLCHAIN),
        ]
    )
    result = {finding["check"]: finding["text"] for finding in run_json("doctor")["findings"]}
    assert result["database"].endswith(": 3 rows, 1 of today's kernels and this toolchain")
    assert result["records"] == (
        "h200: 1 kernels and sizes in your database and the shipped records; configs of calls come from this Triton: 1"
    )
    longer, wider = (replace(PLACE, bucket=Bucket(rows, 1, 8192)) for rows in (1024, 4096))  # not near each other
    folder = store.path.parent / "shipped"
    write_shipped(
        [
            make_record(evidence_changes=OTHER_TOOLCHAIN, place=longer),
            make_record(evidence_changes=OTHER_KERNEL, place=wider),
        ],
        "h200",
        folder,
    )
    monkeypatch.setattr("parallax_gen.files.data_dir", lambda name: folder)  # the folder that the check reads
    store.save(make_record(place=replace(PLACE, gpu="a100")))  # no records ship for it
    result = [finding["text"] for finding in run_json("doctor")["findings"] if finding["check"] == "records"]
    counted = "kernels and sizes in your database and the shipped records; configs of calls come from"
    assert result == [
        f"a100: 1 {counted} this Triton: 1",
        f"h200: 3 {counted} this Triton: 1, Triton 3.4 (not yet checked): 1, the default: 1",
    ]
    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: gpu_by_name("h100"))  # has no records
    result = [finding["text"] for finding in run_json("doctor")["findings"] if finding["check"] == "records"]
    borrowed = "this Triton on h200 (not yet checked): 1, Triton 3.4 on h200 (not yet checked): 1"
    assert result[1] == f"h100: 2 {counted} {borrowed}"
    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: None)
    store.save(make_record(place=longer))
    result = [finding["text"] for finding in run_json("doctor")["findings"] if finding["check"] == "records"]
    assert result[1] == f"h200: 3 {counted} this Triton: 2, the default: 1"
    broken = store.path.with_name("broken.db")
    broken.write_bytes(b"\0" * 5000)
    monkeypatch.setenv("PARALLAX_GEN_DB", str(broken))
    findings = json.loads(run("doctor", "--json").stdout)["findings"]
    assert [(f["check"], f["status"]) for f in findings] == [("database", "broken"), ("records", "ok")]
    assert findings[1]["text"] == (
        "h200: 2 kernels and sizes in only the shipped records; configs of calls come from "
        "Triton 3.4 (not yet checked): 1, the default: 1"
    )
