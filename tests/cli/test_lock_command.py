"""lock, and what explain, doctor, render and export say under a lock."""

from __future__ import annotations

import functools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from cli_samples import CALL, H200, PLACE, SHAPE, SPEC, config, evidence, make_record, run, run_json

from parallax_gen.codegen.render import render
from parallax_gen.memory.calls import add_calls
from parallax_gen.memory.commands import lock_command
from parallax_gen.memory.lock import LockedKernel, read_lock, write_lock
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import default_of
from parallax_gen.memory.shipped import load_shipped
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import config_to_dict
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Bucket, bucket_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime import locking

MODEL = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kernels.lock"


@pytest.fixture
def on(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock of one kernel, which is on."""
    write_lock(path, [LockedKernel.here(PLACE, config(3), H200)])
    monkeypatch.setenv("PARALLAX_GEN_LOCK", str(path))
    return path


def test_lock_one_kernel(store: Store, path: Path) -> None:
    store.save(make_record(splits=2))
    result = run("lock", "-o", path, *CALL)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{path}: 1 kernel and bucket; configs written now: 1 measured here\n"
    assert result.stderr == ""
    assert read_lock(path).kernels == {PLACE: LockedKernel.here(PLACE, config(2), H200)}


def test_lock_prints_json(path: Path) -> None:
    result = run_json("lock", "-o", path, *CALL)
    assert result["lock"] == str(path)
    assert result["kernels"] == [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def test_lock_a_model(path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    result = run("lock", "-o", path, "--gpu", "h200", "--model", tmp_path, "--training")
    assert result.exit_code == 0, result.output
    locked = read_lock(path).kernels
    assert {place.spec.op for place in locked} == {"forward", "preprocess", "dkdv", "dqdr"}
    assert all(place.spec.head_dim == 64 for place in locked)


def test_lock_recorded_calls(path: Path, tmp_path: Path) -> None:
    """All of them: a kernel that takes little time would be an error, too."""
    calls = tmp_path / "calls.jsonl"
    cheap = KernelSpec("forward", 64, "bf16", causal=True), Bucket(8, 128, 128)
    add_calls(calls, {(PLACE.spec, PLACE.bucket): 1_000_000, cheap: 1})
    assert run("lock", "-o", path, "--gpu", "h200", "--calls", calls).exit_code == 0
    assert set(read_lock(path).kernels) == {PLACE, Place("h200", *cheap)}


def test_add_keeps_other_kernels(path: Path) -> None:
    run("lock", "-o", path, *CALL)
    assert run("lock", "-o", path, "--add", *CALL[:-1], "2,32/8,1024").exit_code == 0
    assert len(read_lock(path).kernels) == 2
    run("lock", "-o", path, *CALL)
    assert list(read_lock(path).kernels) == [PLACE]


@pytest.mark.parametrize("add", [(), ("--add",)])
@pytest.mark.parametrize("text", ["my notes\n", "", '{"a": 1}\n', "[1]", "[" * 100_000, "\ufffd"])
def test_a_file_that_is_no_lock_is_not_replaced(path: Path, text: str, add: tuple[str, ...]) -> None:
    path.write_text(text, encoding="utf-8")
    result = run("lock", "-o", path, *add, *CALL)
    assert result.exit_code == 1
    assert result.stderr == f"error: {path} is not a lock, so it is not replaced: name another file, or remove it\n"
    assert path.read_text(encoding="utf-8") == text


def test_a_lock_that_cannot_be_used_is_replaced(path: Path) -> None:
    """Such as that of a later version, or after a merge with conflicts."""
    path.write_text('{"lock": 99, "parallax_gen": "9.0"}\n<<<<<<<\n', encoding="utf-8")
    assert run("lock", "-o", path, *CALL).exit_code == 0
    assert list(read_lock(path).kernels) == [PLACE]


def test_lock_says_what_it_could_not_check(store: Store, path: Path) -> None:
    store.save(make_record(evidence=evidence(PLACE, config(2), triton="3.4.1")))
    result = run("lock", "-o", path, *CALL)
    assert "configs written now: 1 another toolchain" in result.stdout
    assert result.stderr == "1 borrowed kernel was locked without a check for spills: lock on the card to check them\n"


def test_a_lock_that_is_on_does_not_decide_what_is_locked(store: Store, on: Path) -> None:
    store.save(make_record(splits=2))
    assert run("lock", "-o", on, *CALL).exit_code == 0
    assert read_lock(on).kernels[PLACE].config == config(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --op and --shape, or --model"),
        (("--op", "decode"), "give --op and --shape, or --model"),
        (("--shape", SHAPE), "give --op and --shape, or --model"),
        (("--calls", "calls.jsonl", "--op", "decode", "--shape", SHAPE), "--calls has the kernels and sizes"),
        (("--calls", "calls.jsonl", "--for", "serving", "--heads", "8"), "--calls has the kernels and sizes"),
        (("--for", "serving", "--heads", "8", "--op", "decode", "--shape", SHAPE), "leave out --op and --shape"),
    ],
)
def test_one_way_to_name_kernels(path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("lock", "-o", path, "--gpu", "h200", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not path.exists()


def test_the_command_of_an_error_locks_its_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    original = locking.lock_kernels

    def lock_kernels(path: Path, kernels: Any, gpu: Any, memory: Any, *, add: bool) -> Any:
        assert add
        found[:] = [Place(gpu.name, spec, bucket_of(shape)) for spec, shape in kernels]
        return original(path, [], gpu, memory)  # which writes nothing

    monkeypatch.setattr(locking, "lock_kernels", lock_kernels)
    places = dict.fromkeys(record.place for gpu in ("h100", "h200") for record in shipped(gpu)[::25])
    assert len({place.spec.op for place in places}) > 4
    for place in places:
        program, *arguments = shlex.split(lock_command(place, path))
        assert program == "parallax-gen"
        run(*arguments)
        assert found == [place]


@functools.cache
def shipped(gpu: str) -> Any:
    from parallax_gen import files

    return load_shipped(gpu, files.data_dir("tuning_db"))


def test_an_error_is_mended_by_its_command(on: Path) -> None:
    other = (*CALL[:-1], "2,32/8,1024")
    message = run("explain", *other).stderr
    assert message.startswith(f"error: {on} does not have decode")
    assert run(*shlex.split(message.split("`")[1])[1:]).exit_code == 0
    assert run("explain", *other).exit_code == run("explain", *CALL).exit_code == 0


# -- explain


def test_explain_says_that_no_lock_is_on() -> None:
    assert "lock    no lock is on (PARALLAX_GEN_LOCK is not set)\n" in run("explain", *CALL).stdout
    assert run_json("explain", *CALL)["lock"] is None


def test_explain_under_a_lock(store: Store, on: Path) -> None:
    store.save(make_record(splits=2))
    text = run("explain", *CALL).stdout
    assert f"lock    {on} is on: 1 kernel and bucket; others get an error\n" in text
    assert "from    the lock, which decides: locked kernels are not checked for spills\n" in text
    result = run_json("explain", *CALL)
    assert (result["from"], result["tier"], result["lock"]) == ("lock", "the lock", str(on))
    assert result["config"] == config_to_dict(config(3))
    assert [r["record"]["config"]["NUM_SPLITS"] for r in result["runners_up"]] == [2]


def test_explain_fails_where_a_call_would(on: Path) -> None:
    write_lock(on, [LockedKernel(PLACE, config(3), "0" * 32, LockedKernel.here(PLACE, config(3), H200).toolchain)])
    result = run("explain", *CALL)
    assert result.exit_code == 1
    assert "as kernel 000000000000, but its config now renders kernel" in result.stderr
    assert lock_command(PLACE, on) in result.stderr


def test_explain_a_default_that_the_lock_allows(on: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_GEN_LOCK_MISSING", "default")
    result = run_json("explain", *CALL[:-1], "2,32/8,1024")
    assert (result["from"], result["tier"]) == ("default", "the default")
    assert result["reason"].startswith(f"{on} does not have decode")
    assert result["reason"].endswith("and allows the default")


def test_explain_a_model_under_a_lock(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    arguments = ("--gpu", "h200", "--model", tmp_path, "--training")
    assert "no lock is on" in run("explain", *arguments).stdout
    run("lock", "-o", path, *arguments)
    monkeypatch.setenv("PARALLAX_GEN_LOCK", str(path))
    assert f"{path} is on: 4 kernels and buckets" in run("explain", *arguments).stdout
    document = run_json("explain", *arguments)
    assert document["lock"] == str(path)
    assert {kernel["from"] for step in document["steps"] for kernel in step["kernels"]} == {"the lock"}
    assert "does not have" in run("explain", *arguments, "--batch", "64").stderr


# -- doctor


@pytest.fixture
def only_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    from parallax_gen.cli import doctor

    monkeypatch.setattr(doctor, "CHECKS", {"lock": doctor.CHECKS["lock"]})


def test_doctor_says_whether_a_lock_is_on(only_lock: None, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("doctor").stdout.split(maxsplit=2)[:2] == ["lock", "ok"]
    assert "no lock is on" in run("doctor").stdout
    write_lock(path, [LockedKernel.here(PLACE, config(3), H200)])
    monkeypatch.setenv("PARALLAX_GEN_LOCK", str(path))
    result = run("doctor")
    assert result.exit_code == 0
    assert f"{path} is on: 1 kernel and bucket" in result.stdout
    assert "locked kernels are not checked for spills" in result.stdout


@pytest.mark.parametrize("broken", ["kernel", "toolchain", "file"])
def test_doctor_holds_the_lock_against_the_environment(only_lock: None, on: Path, broken: str) -> None:
    right = LockedKernel.here(PLACE, config(3), H200)
    other = LockedKernel.here(Place("h200", SPEC, Bucket(256, 1, 1024)), config(3), H200)
    if broken == "file":
        on.write_text("{}", encoding="utf-8")
    elif broken == "kernel":
        write_lock(on, [other, LockedKernel(PLACE, config(3), "0" * 32, right.toolchain)])
    else:
        write_lock(on, [other, LockedKernel(PLACE, config(3), right.kernel, type(right.toolchain)("3.1.0", "12.4"))])
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stdout.split(maxsplit=2)[:2] == ["lock", "broken"]
    expected = {
        "file": f"{on}, line 1: not the header of a lock",
        "kernel": f"calls of 1 of 2 locked kernels fail; the first: {on} has decode",
        "toolchain": "with Triton 3.1.0, ptxas 12.4, but here is",
    }
    assert expected[broken] in result.stdout


@pytest.mark.parametrize("missing", ["error", "default"])
def test_doctor_says_that_a_lock_is_for_other_cards(
    only_lock: None, on: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLAX_GEN_LOCK_MISSING", missing)
    for name, said in {"h200": False, "h100": True}.items():
        monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index, name=name: gpu_by_name(name))
        result = json.loads(run("doctor", "--json").stdout)
        gets = "an error" if missing == "error" else "their defaults"
        text = f"no kernel of {on} is for this card, h100: calls get {gets}"
        status = "broken" if missing == "error" else "note"
        assert ({"check": "lock", "status": status, "text": text} in result["findings"]) == said
        assert result["broken"] == (said and missing == "error")


def test_doctor_says_that_the_mode_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from parallax_gen.cli import doctor

    monkeypatch.setattr(doctor, "CHECKS", {"mode": doctor.CHECKS["mode"]})
    assert run("doctor").stdout == ""
    monkeypatch.setenv("PARALLAX_GEN_BATCH_INVARIANT", "on")
    assert "PARALLAX_GEN_BATCH_INVARIANT is on" in run("doctor").stdout


# -- render and export write what a call launches.


def test_render_and_export_follow_the_lock(store: Store, on: Path, tmp_path: Path) -> None:
    store.save(make_record(splits=2))
    locked = render(SPEC, config(3), H200).text
    assert run("render", *CALL).stdout == locked
    (exported,) = run_json("export", *CALL, "-o", tmp_path / "out")["kernels"]
    assert Path(exported["file"]).read_text(encoding="utf-8") == locked
    assert exported["from"] == "the lock that was on, which decides without records"
    assert default_of(PLACE, H200) != config(3)
