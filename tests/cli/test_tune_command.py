"""tune: without a GPU (real compilers), and on a simulated GPU."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
from pathlib import Path

import pytest
from cli_samples import CALL, H200, PLACE, config, dkdv_record, make_record, run, start_python
from fake_card import FakeDevice, FakeWorker, fake_machine
from rich.console import Console

from parallax_gen.memory.result import Outcome
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Bucket
from parallax_gen.tuning import tuner as tuning
from parallax_gen.tuning.interrupt import Interrupt
from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.progress import ProgressView
from parallax_gen.tuning.workers.messages import Reply

FEW = ("--trials", "4", "--time-budget", "60", "--workers", "1")

# SIGINT may be ignored where the tests run, as in a shell's background jobs, and a child would inherit that.
ENABLE_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


def test_without_a_gpu_it_compiles_and_ranks(store: Store) -> None:
    child = start_python("-m", "parallax_gen.cli", "tune", *CALL, *FEW, "--trials", "2", "--json")
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    summary = json.loads(out)
    assert not summary["measured"]
    (job,) = summary["jobs"]
    assert (job["outcome"], job["trials"], job["known"]) == ("predicted", 2, 0)
    lines = err.splitlines()
    assert lines[0] == "no CUDA device here: compiling and ranking only, nothing will be measured (predicted)"
    assert lines[1] == "[1/1] h200: decode, head_dim 128, bf16, GQA 4:1; batch x kv_heads 256, seqlen 1x8192"
    assert lines[-1].startswith("nothing was measured: these times are predicted")
    results = store.results(PLACE)
    assert [r.outcome for r in results] == ["predicted"] * 2
    assert job["time_us"] == results[0].time_us

    second = run("tune", *CALL, *FEW, "--trials", "1")
    assert second.exit_code == 0, second.output
    assert "2 configs have results of earlier tunes" in second.stderr
    assert len(store.results(PLACE)) == 3
    assert f"database: {store.path}" in second.stdout
    assert "\x1b" not in second.output


def test_with_a_gpu_it_measures(fake_h200: None, store: Store) -> None:
    result = run("tune", *CALL, *FEW)
    assert result.exit_code == 0, result.output
    assert "nothing was measured" not in result.stderr
    best = store.results(PLACE)[0]
    assert best.time_us is not None
    assert f"{best.time_us:.1f}" in result.stdout
    assert "1 wrong" in result.stdout
    assert "3 ok, 1 wrong; best " in result.stderr
    summary = json.loads(run("tune", *CALL[2:], *FEW, "--json").stdout)  # without --gpu: the installed card
    assert summary["measured"]
    assert summary["gpu"] == "h200"
    assert summary["jobs"][0]["known"] == 4


def test_a_gpu_that_is_not_installed_is_refused(fake_h200: None, store: Store) -> None:
    result = run("tune", "--gpu", "h100", *FEW)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --gpu is h100, but the card here is h200 (NVIDIA H200 SXM)")
    assert store.all() == []


def test_it_fails_if_no_config_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "ask", lambda *_: Reply(Outcome.COMPILE, "nothing compiles"))
    result = run("tune", *CALL, *FEW)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: no config worked")
    assert "4 compile" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--op", "dkdv", "--stats"),
        ("--op", "preprocess", "--full"),
        ("--op", "forward", "--ragged"),
        ("--op", "forward", "--leftpad"),
        ("--trials", "0"),
        ("--time-budget", "0"),
        ("--op", "decode", "--shape", "1,8,0x4096"),
        ("--op", "training", "--stats"),
        ("--op", "training", "--head-dim", "72"),  # no usual shape
    ],
)
def test_invalid_options_are_usage_errors_of_tune(arguments: tuple[str, ...], store: Store) -> None:
    assert run("tune", "--gpu", "h200", *arguments).exit_code == 2
    assert store.all() == []


def test_options_can_be_repeated(fake_h200: None) -> None:
    arguments = ("--head-dim", "64", "--head-dim", "128", "--dtype", "fp16", "--dtype", "bf16", "--shape", "1,8,1024")
    both = ("--op", "forward", "--op", "decode")
    result = run("tune", "--gpu", "h200", *both, *arguments, "--trials", "1", "--json")
    jobs = json.loads(result.stdout)["jobs"]
    kernels = [(job["spec"]["op"], job["spec"]["head_dim"], job["spec"]["dtype"]) for job in jobs]
    assert len(kernels) == len(set(kernels)) == 8
    assert "[8/8]" in result.stderr


def test_a_training_step(fake_h200: None, store: Store) -> None:
    arguments = ("--op", "training", "--head-dim", "96", "--shape", "2,32/8,4096", "--window", "513", "--trials", "2")
    result = run("tune", *arguments)
    assert result.exit_code == 0, result.output
    make_record = {r.place.spec.op: r.place for r in store.all()}
    assert list(make_record) == ["dkdv", "dqdr", "forward", "preprocess"]
    for op, place in make_record.items():
        assert place.spec.head_dim == 96
        assert place.bucket.window == (0 if op == "preprocess" else 512)
    assert make_record["forward"].spec.stats
    blocks = result.stdout.split("\n\n")
    assert [block.splitlines()[0].split(",")[0] for block in blocks[:4]] == [
        "h200: forward",
        "h200: preprocess",
        "h200: dkdv",
        "h200: dqdr",
    ]
    assert "4096 W512" in blocks[2]
    assert [unit in block for block in blocks[:4] for unit in ("GB/s", "TFLOP/s")] == [
        *(False, True),
        *(True, False),
        *(False, True),
        *(False, True),
    ]
    tables = [line for line in result.stdout.splitlines() if "  M" in line]
    assert len(tables) == 4
    assert max(map(len, tables)) <= 80
    second = run("tune", *arguments, "--json")
    assert [job["known"] for job in json.loads(second.stdout)["jobs"]] == [2] * 4


def test_without_options_everything_is_tuned(fake_h200: None) -> None:
    result = run("tune", "--shape", "1,8,1024", "--trials", "1", "--json")
    kernels = [(job["spec"]["op"], job["spec"]["stats"]) for job in json.loads(result.stdout)["jobs"]]
    step = [("forward", True), ("preprocess", False), ("dkdv", False), ("dqdr", False)]
    assert kernels == [("forward", False), ("decode", False), *step]


# Several devices, several hosts


def test_several_devices_share_the_jobs(fake_h200: None, store: Store) -> None:
    result = run("tune", "--op", "training", "--shape", "1,8,1024", *FEW, "--devices", "0,2,3")
    assert result.exit_code == 0, result.output
    assert "[4/4] h200: dqdr" in result.stderr
    assert "\n  [1] " in result.stderr  # lines name their device
    assert len({r.place for r in store.all()}) == 4


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("h200", None), "error: --devices: there is no CUDA device 1 here"),
        ((None, "h200"), "error: there is no CUDA device here: name a GPU"),
        (("h200", "h100"), "error: --devices: 1 is h100, but the first one is h200"),
    ],
)
def test_devices_must_exist_and_be_of_one_model(
    names: tuple[str | None, ...], said: str, fake_h200: None, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(monkeypatch, *(FakeDevice(name and gpu_by_name(name)) for name in names))
    result = run("tune", *FEW, "--devices", "0,1")
    assert result.exit_code == 2
    assert result.stderr.startswith(said)
    assert store.all() == []


@pytest.mark.parametrize("devices", ["", "a", "0,0", "-1", "0;1"])
def test_devices_must_be_distinct_indices(devices: str) -> None:
    result = run("tune", *CALL, "--devices", devices)
    assert result.exit_code == 2
    assert "indices" in result.stderr


def test_a_second_worker_reuses_the_results_of_the_first(fake_h200: None, store: Store, tmp_path: Path) -> None:
    """It has its own database, and does not measure again."""
    storage = ("--storage", f"journal:{tmp_path / 'journal'}")
    run("tune", *CALL, *FEW, *storage)
    first = {r.config for r in store.results(PLACE)}
    assert len(first) == 4
    result = run("tune", *CALL, *FEW, *storage, env={"PARALLAX_GEN_DB": str(tmp_path / "other.db")})
    assert result.exit_code == 0, result.output
    with Store(tmp_path / "other.db") as other:
        both = {r.config for r in other.results(PLACE)}
    assert first < both
    assert len(both) == 8


def test_predictions_are_not_shared(store: Store, tmp_path: Path) -> None:
    """Other tuners would take a config that was only compiled as tried."""
    result = run("tune", *CALL, *FEW, "--storage", f"journal:{tmp_path / 'journal'}")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: --storage: there is no CUDA device here")
    assert not (tmp_path / "journal").exists()
    assert store.all() == []


def test_an_invalid_storage_is_an_error(fake_h200: None, store: Store) -> None:
    result = run("tune", *CALL, *FEW, "--storage", "somewhere")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the storage is neither journal:FILE nor a URL")


def test_ctrl_c_keeps_finished_trials(store: Store) -> None:
    code = ENABLE_CTRL_C + f"from parallax_gen.cli import main; main({['tune', *CALL, '--workers', '1']!r})"
    child = start_python("-c", code)
    assert child.stderr is not None
    for line in child.stderr:
        if "trial 1" in line:
            break
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == f"stopped: all finished trials are stored in {store.path}; run again to continue"
    assert store.results(PLACE)


def test_the_second_ctrl_c_does_not_wait() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interrupt() as interrupt:
            interrupt.check()
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                interrupt.check()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Interrupt():
            signal.raise_signal(signal.SIGINT)  # ignored before, so still ignored
    finally:
        signal.signal(signal.SIGINT, before)


# Progress output


def test_a_terminal_shows_live_progress() -> None:
    screen = io.StringIO()
    job = Job(PLACE.spec, PLACE.bucket, H200)
    with ProgressView(
        Console(file=screen, force_terminal=True, width=100, markup=False, highlight=False),
        3,
        trials=96,
        time_budget_s=45,
    ) as view:
        view.begin(job)
        progress = Progress(
            job, known=7, outcomes={"ok": 11, "wrong": 1}, best=make_record(250.0, splits=1), seconds=12.3
        )
        view.update(progress)
    text = screen.getvalue()
    assert "[1/3] h200: decode" in text
    assert "7 configs have results of earlier tunes" in text
    assert "trials 12/96  11 ok, 1 wrong" in text
    assert "best 250.0 us, 4298 GB/s, N32 H8 S1 w1 s4" in text
    assert "45 of 45 s left" in text or "44 of 45 s left" in text


def test_a_pipe_gets_a_line_for_each_new_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallax_gen.tuning.progress.MAX_SILENCE_S", 1e9)
    pipe = io.StringIO()
    job = Job(PLACE.spec, PLACE.bucket, gpu_by_name("h200"))
    with ProgressView(
        Console(file=pipe, width=80, markup=False, highlight=False), 1, trials=96, time_budget_s=45
    ) as view:
        view.begin(job)
        progress = Progress(job)
        for n, best in enumerate((None, make_record(300.0), make_record(300.0), make_record(250.0, splits=1)), start=1):
            progress.outcomes, progress.best = {"ok": n}, best
            view.update(progress)
        view.end(progress)
    lines = pipe.getvalue().splitlines()
    assert [line.split(",")[0].strip() for line in lines[1:3]] == ["trial 2", "trial 4"]
    assert lines[3].strip().startswith("4 trials in 0 s: 4 ok; best 250.0 us")
    assert len(lines) == 4
    assert config(1) == make_record(splits=1).config


# -- refresh


def test_refresh_times_known_records_again(fake_h200: None, store: Store) -> None:
    other = dataclasses.replace(PLACE, bucket=Bucket(1024, 1, 8192))
    for place in (PLACE, other):
        store.save(make_record(splits=3, place=place))
    summary = json.loads(run("tune", "--refresh", "--workers", "1", "--json").stdout)
    assert {(job["bucket"]["kv_rows"], job["outcome"]) for job in summary["jobs"]} == {(256, "ok"), (1024, "ok")}
    assert all(job["trials"] == 2 and job["known"] == 0 for job in summary["jobs"])  # the default, and its record
    assert len(store.results(PLACE)) == 2

    refreshed = json.loads(run("tune", "--refresh", *CALL, "--workers", "1", "--json").stdout)
    assert [job["bucket"]["kv_rows"] for job in refreshed["jobs"]] == [256]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--op", "forward"), "error: --refresh: there are no results of these kernels on h200: tune them first"),
        (("--dtype", "fp16"), "error: --refresh: there are no results of these kernels on h200: tune them first"),
        (
            ("--storage", "journal:file"),
            "--refresh cannot be combined with --storage: one process times its own records",
        ),
    ],
)
def test_refresh_refuses_unsupported_options(
    fake_h200: None, store: Store, options: tuple[str, ...], message: str
) -> None:
    store.save(make_record())
    result = run("tune", "--refresh", *options, "--workers", "1")
    assert result.exit_code != 0
    assert message in result.stderr


def test_refresh_needs_a_device(store: Store) -> None:
    store.save(make_record())
    result = run("tune", "--gpu", "h200", "--refresh", "--workers", "1")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: --refresh: there is no CUDA device here to measure on"


def test_refresh_of_training_times_all_kernels_of_a_step(fake_h200: None, store: Store) -> None:
    store.save(make_record())
    store.save(dkdv_record())
    (job,) = json.loads(run("tune", "--refresh", "--op", "training", "--workers", "1", "--json").stdout)["jobs"]
    assert job["spec"]["op"] == "dkdv"
