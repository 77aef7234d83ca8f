"""The command line in shells and pipes: completion, suggestions, log lines, exit codes."""

from __future__ import annotations

import glob
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli_samples import CALL, PLACE, config, make_record, run, run_json, start_python
from click.shell_completion import ShellComplete

import parallax_gen
from parallax_gen.cli import COMMANDS, main
from parallax_gen.cli.completion import SHELLS
from parallax_gen.cli.text import print_table
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.spec import DTYPES
from parallax_gen.problem.workloads import BENCH_GRIDS, GRIDS, OPS_AND_TRAINING
from parallax_gen.runtime.dispatch import Dispatcher

# click's own words, before and since 8.4.
NO_SUCH_OPTION = r"No such option(: --nonsense| '--nonsense'\.)"
WIDE = ("column", "note"), [("c" * 70, "one two three " * 9), ("short", "four")]


def completed(*arguments: str) -> list[str]:
    """The completions of the last word."""
    return [item.value for item in ShellComplete(main, {}, "", "").get_completions(list(arguments[:-1]), arguments[-1])]


# completion


@pytest.mark.parametrize(
    ("arguments", "offered"),
    [
        (("tune", "--gpu", ""), list(GPUS)),
        (("list", "--gpu", "H2"), ["h20", "h200"]),
        (("ship", "--gpu", "h1"), ["h100", "h100-pcie", "h100-nvl"]),
        (("explain", "--op", ""), list(OPS_AND_TRAINING)),
        (("show", "--dtype", ""), list(DTYPES)),
        (("tune", "--grid", ""), list(GRIDS)),
        (("bench", "--grid", ""), list(BENCH_GRIDS)),
        (("bench", "--only", "SD"), ["SDPA flash", "SDPA cuDNN"]),
        (("completion", ""), list(SHELLS)),
        (("ex",), ["explain", "export"]),
    ],
)
def test_values_are_completed(arguments: tuple[str, ...], offered: list[str]) -> None:
    assert completed(*arguments) == offered


def test_completion_scripts_of_each_shell_call_this_program() -> None:
    for shell in SHELLS:
        script = run("completion", shell).stdout
        assert f"_PARALLAX_GEN_COMPLETE={shell}_complete" in script
        assert "parallax-gen" in script


# typing errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explian",), "No such command explian. Did you mean explain?"),
        (("tunes",), "Did you mean tune?"),
        (("xyzzy",), "No such command xyzzy."),
        (("bench", "--gird", "parallax-kernel"), "Did you mean --grid?"),
        (("list", "--op", "decod"), "decod is not one of"),
    ],
)
def test_a_mistyped_word_is_a_usage_error_with_a_suggestion(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split()).replace("'", "")  # Click's versions quote differently
    assert "Traceback" not in done.output


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_help_parse(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("sweeps/h200.jsonl.gz", "colleague.jsonl", "old/tuning.db"):  # files that the examples name
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    lines = [line.strip() for line in run(name, "--help").stdout.splitlines()]
    examples = [line for line in lines if line.startswith(f"parallax-gen {name} ") or line == f"parallax-gen {name}"]
    assert examples
    for example in examples:
        arguments = [result for word in shlex.split(example.partition(" >")[0]) for result in glob.glob(word) or [word]]
        context = main.make_context("parallax-gen", arguments[1:])
        command = main.get_command(context, name)
        assert command is not None
        command.make_context(name, arguments[2:], parent=context)


def test_exit_codes_are_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "0 done, 1 an error (printed in one line), 2 wrong usage, 130 Ctrl-C" in run("--help").stdout

    def interrupted() -> None:
        raise KeyboardInterrupt

    assert (run("list").exit_code, run("list", "--gpu", "h2000").exit_code, run("list", "--x").exit_code) == (0, 2, 2)
    monkeypatch.setattr("parallax_gen.memory.descriptions.open_memory", interrupted)
    assert run("list").exit_code == 130


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("explain",), 2, "give --op and --shape, or --model, or --for with --heads (see "),
        (("db", "prune"), 2, "give one or more of --other-environments, --failures, --predicted, --older-than DAYS"),
        (("--nonsense",), 2, NO_SUCH_OPTION),
        (("render", "--op", "dkdv", "--head-dim", "100"), 2, "100 is not a multiple of 8"),
        (("render", "--op", "preprocess", "--dtype", "tf32", "--gpu", "h200"), 2, "dtype: got 'tf32'; allowed: "),
        (("list", "--gpu", "h2000"), 2, "did you mean h200?"),
        (("render", *CALL, "--config", "{}"), 2, "a decode config has the fields"),
        (("tune", "--model", "nothing", "--gpu", "h200"), 2, "--model: got "),
        (("ship", "--gpu", "h200"), 1, "has no measurement of today's kernels"),
    ],
)
def test_errors_have_one_style_and_a_status_by_kind(arguments: tuple[str, ...], status: int, message: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (status, "")
    assert done.stderr.startswith("error: ")
    assert re.search(message if message == NO_SUCH_OPTION else re.escape(message), done.stderr)
    assert done.stderr.count("\n") == 1


def test_a_group_without_a_command_shows_its_help() -> None:
    for arguments in ((), ("db",)):
        done = run(*arguments)
        assert done.exit_code == 2
        assert "Commands:" in done.output
        assert "error:" not in done.output


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("h2000", "h200"),
        ("H100 SXM9", "h100"),
        ("rtx 4080", "rtx4090"),
        ("a1000", "a100"),
        ("mi300", "mi300x"),
        ("gfx942", "mi300x or mi325x or mi300a"),
        ("sm_100", "b200 or gb200"),
        ("voodoo", ""),
    ],
)
def test_an_unknown_gpu_gets_the_nearest_name(name: str, nearest: str) -> None:
    for command in (("list",), ("explain", *CALL[2:]), ("report",), ("ship",), ("db", "export", "-")):
        said = run(*command, "--gpu", name).stderr
        assert said.startswith(f"error: unknown GPU {name!r}; known GPUs: a100, ")
        assert said.endswith(f"; did you mean {nearest}?\n" if nearest else f", {list(GPUS)[-1]}\n")


def test_help_summaries_are_not_truncated() -> None:
    text = run("--help").stdout
    assert "..." not in text.partition("Commands:")[2]
    assert max(map(len, text.splitlines())) <= 80


# pipes


def test_piped_output_has_whole_lines_without_colours(store: Store) -> None:
    store.save(make_record(250.0))
    child = start_python("-m", "parallax_gen.cli", "list")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert "\x1b" not in out
    assert "…" not in out
    assert not any(line != line.rstrip() for line in out.splitlines())


def test_a_row_is_one_line_in_a_pipe_and_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(*WIDE)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["c" * 70, *["one", "two", "three"] * 9]
    monkeypatch.setenv("COLUMNS", "80")
    print_table(*WIDE)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()).count("three") == 9


def test_the_last_column_wraps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "22")
    print_table(("time", "name", "why"), [("9.5", "a", "it spills registers"), ("10", "bc", "")], right=("time",))
    assert capsys.readouterr().out.splitlines() == [
        "time  name  why",
        " 9.5  a     it spills",
        "            registers",
        "  10  bc",
    ]
    print_table(("a", "b"), [])
    assert capsys.readouterr().out == "a  b\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_a_one_line_error() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, "-m", "parallax_gen.cli", "list", "--gpu", "h200"]
        folder = Path(parallax_gen.__file__).parents[1]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, encoding="utf-8", timeout=60, cwd=folder)
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_a_closed_pipe_is_no_error(store: Store) -> None:
    store.save(make_record(250.0))
    child = start_python("-m", "parallax_gen.cli", "list")
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == ""
    child.wait(timeout=60)


# log lines


def test_verbose_logs_the_config_and_the_reason(store: Store) -> None:
    message = run("-v", "render", *CALL).stderr
    assert "decode, head_dim 128, bf16, GQA 4:1; batch x kv_heads 256, seqlen 1x8192, on h200: the default" in message
    store.save(make_record(200.0, splits=3))
    message = run("--verbose", "render", *CALL).stderr
    assert f"measured here, 200.0 us, 2026-01-01T00:00:00+00:00: BLOCK_N={config(3).BLOCK_N} " in message
    assert "NUM_SPLITS=3" in message
    assert run("render", *CALL).stderr == ""  # the log handler is removed after its command
    assert run("render", *CALL, "-v").stderr == run("-v", "render", "-v", *CALL).stderr == message


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "db"] + ["db stats", "db check"])
def test_verbose_is_an_option_before_and_after_each_command(command: str) -> None:
    assert "-v, --verbose" in run(*command.split(), "--help").stdout
    assert "-v, --verbose" in run("--help").stdout
    assert "No such option" not in run(*command.split(), "-v", "--help").output


def test_the_dispatcher_logs_once_per_bucket_and_names_the_file(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from parallax_gen.memory.shipped import Memory
    from parallax_gen.problem.shapes import Shape

    monkeypatch.setenv("PARALLAX_GEN_QUIET", "1")  # silence the warning of runtime/dispatch.py
    caplog.set_level(logging.INFO, "parallax_gen")
    dispatcher, gpu = Dispatcher(Memory(None)), GPUS["h200"]
    modules = [dispatcher.kernel(PLACE.spec, Shape(32, 32, 8, 1, keys), gpu)[1] for keys in (8192, 8000)]
    chosen, runs = caplog.messages
    assert ": the default: BLOCK_N=" in chosen
    assert runs == f"{PLACE.spec}; {PLACE.bucket}: runs {modules[0].__file__}"


def test_the_library_logs_nothing_by_default() -> None:
    code = "import logging, parallax_gen; logging.getLogger('parallax_gen').error('x')"
    folder = Path(parallax_gen.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, cwd=folder)
    assert done.stderr == ""


# JSON


def test_render_and_export_and_ship_have_json(store: Store, tmp_path: Path) -> None:
    store.save(make_record(200.0, splits=3))
    rendered = run_json("render", *CALL)
    assert rendered["source"] == run("render", *CALL).stdout
    assert rendered["config"]["NUM_SPLITS"] == 3
    exported = run_json("export", *CALL, "-o", tmp_path / "out")
    (kernel,) = exported["kernels"]
    assert Path(kernel["file"]).read_text(encoding="utf-8") == rendered["source"]
    assert kernel["config"] == rendered["config"]
    shipped = run_json("ship", "--gpu", "h200", "--to", tmp_path / "db")
    assert (shipped["records"], shipped["new_or_changed"]) == (1, 1)
    assert Path(shipped["file"]).exists()


def test_an_impossible_folder_is_a_one_line_error(store: Store, tmp_path: Path) -> None:
    store.save(make_record(200.0, splits=3))
    (tmp_path / "file").write_text("", encoding="utf-8")
    for arguments in (("ship", "--gpu", "h200", "--to"), ("export", *CALL, "-o")):
        done = run(*arguments, tmp_path / "file" / "db")
        assert done.exit_code == 1
        assert done.stderr.startswith("error: cannot ")
        assert done.stderr.count("\n") == 1
