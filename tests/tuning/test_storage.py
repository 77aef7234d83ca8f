"""Several tuners share a job through Optuna's storages: a real PostgreSQL, and a journal file."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psycopg
import pytest
from forked import start_program
from shared_tune import JOB, cost

from parallax_gen.errors import StoreError
from parallax_gen.memory.result import Evidence, Result
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import config_to_json
from parallax_gen.ops.space import every_config
from parallax_gen.tuning.claims import SharedClaims, Storage
from parallax_gen.tuning.job import program_key

PROGRAM = Path(__file__).with_name("shared_tune.py")
CONFIGS = list(every_config(JOB.spec, JOB.gpu))
EVIDENCE = Evidence.here("0123456789abcdef" * 2, "fedcba9876543210" * 2)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server that only these tests use."""
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.environ["PATH"].split(os.pathsep))]
    bin = next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)
    if bin is None:
        pytest.skip("PostgreSQL's server is not installed")
    user = pwd.getpwuid(os.getuid()).pw_name
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        user = next((account.pw_name for account in pwd.getpwall() if account.pw_name in ("postgres", "nobody")), "")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # the path of a Unix socket must be short
    shutil.chown(folder, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = str(folder / "data")
    subprocess.run(
        [bin / "initdb", "-D", data, "-A", "trust", "-U", "tuner"],
        user=user,
        check=True,
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    options = ["-D", data, "-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    server = subprocess.Popen([bin / "postgres", *options], user=user, cwd=folder, stderr=subprocess.DEVNULL)
    try:
        while subprocess.run([bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]).returncode:
            assert server.poll() is None
            time.sleep(0.1)
        yield f"postgresql://tuner@127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)  # fast shutdown: does not wait for clients
        server.wait(30)
        shutil.rmtree(folder)


@pytest.fixture(params=["postgresql", "journal"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty storage."""
    if request.param == "journal":
        return f"journal:{tmp_path / 'journal'}"
    server = request.getfixturevalue("postgresql")
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"create database {name}")
    return f"{server}/{name}"


def work(folder: Path, url: str, number: int) -> BaseProcess:
    stdout = folder / f"{number}.txt"
    stdout.touch()
    return start_program(PROGRAM, folder / f"{number}.db", url, number, stdout=stdout)


def measured(folder: Path, number: int) -> list[str]:
    return (folder / f"{number}.txt").read_text(encoding="utf-8").splitlines()


def test_tuners_try_every_config_once_even_if_one_is_killed(url: str, tmp_path: Path) -> None:
    """Every tuner has all results, including those of the killed tuner, whose unfinished config another one tries."""
    tuners = {number: work(tmp_path, url, number) for number in range(4)}
    while len(measured(tmp_path, 0)) < 2:
        assert tuners[0].is_alive()
        time.sleep(0.01)
    tuners[0].kill()
    for number, tuner in tuners.items():
        tuner.join(100)
        assert tuner.exitcode == (-9 if number == 0 else 0)
    tried = Counter(config for number in tuners for config in measured(tmp_path, number))
    assert set(tried) == {config_to_json(config) for config in CONFIGS}
    unfinished = {measured(tmp_path, 0)[-1]}
    assert {config for config, count in tried.items() if count > 1} <= unfinished
    assert min(len(measured(tmp_path, number)) for number in tuners) > 0
    longest = max(tuners, key=lambda number: (tmp_path / f"{number}.db").stat().st_mtime)
    with Store(tmp_path / f"{longest}.db") as store:
        results = store.results(JOB.place)
    assert {r.config for r in results} == set(CONFIGS)
    for result in results:
        if cost(result.config) > 100:
            assert result.outcome in ("ok", "slow")
            assert result.time_us == cost(result.config)
        else:
            assert (result.outcome, result.detail) == ("crash", "made up")


def shared_claims(url: str, count: int, lease_s: float = 60.0) -> list[SharedClaims]:
    return [Storage(url, lease_s=lease_s).claims(JOB.place, program_key(JOB)) for _ in range(count)]


def ok(number: int, time_us: float = 10.0) -> Result:
    return Result(JOB.place, EVIDENCE, CONFIGS[number], "ok", time_us=time_us)


def test_claims_and_new_results(url: str) -> None:
    first, second = shared_claims(url, 2)
    assert first.claim(CONFIGS[0])
    assert not first.claim(CONFIGS[0])
    assert not second.claim(CONFIGS[0])
    assert second.claim(CONFIGS[1])
    assert first.others_have_claims()
    first.finish(ok(0))
    second.finish(Result(JOB.place, EVIDENCE, CONFIGS[1], "wrong", error=float("inf"), detail="row 3"))
    assert not first.others_have_claims()
    assert [r.config for r in second.new_results()] == [CONFIGS[0]]
    (shared,) = first.new_results()
    assert (shared.config, shared.outcome, shared.error, shared.detail) == (
        CONFIGS[1],
        "wrong",
        float("inf"),
        "row 3",
    )
    assert second.new_results() == first.new_results() == []
    assert not second.claim(CONFIGS[0])  # already tried
    first.publish(ok(0, 12.0))
    assert [r.time_us for r in second.new_results()] == [12.0]
    assert len(shared_claims(url, 1)[0].new_results()) == 3


def test_tuners_with_other_programs_do_not_share_claims(url: str) -> None:
    (first,) = shared_claims(url, 1)
    other = Storage(url).claims(JOB.place, "another kernel, Triton 9.9")
    assert first.claim(CONFIGS[0])
    assert other.claim(CONFIGS[0])
    first.finish(ok(0))
    assert other.new_results() == []


def test_a_released_config_can_be_claimed(url: str) -> None:
    first, second = shared_claims(url, 2)
    assert first.claim(CONFIGS[2])
    first.release()
    assert second.claim(CONFIGS[2])
    second.release()


def test_the_claim_of_a_dead_tuner_expires(url: str) -> None:
    gone, second = shared_claims(url, 2, lease_s=4.0)
    assert gone.claim(CONFIGS[3])
    assert not second.claim(CONFIGS[3])
    time.sleep(4.1)
    second.heartbeat()
    assert second.claim(CONFIGS[3])
    gone.finish(ok(3, 1.0))  # the tuner was only late: its result is accepted, but its claim is lost
    assert not gone.claim(CONFIGS[3])
    second.finish(ok(3))
    assert 10.0 in [r.time_us for r in shared_claims(url, 1)[0].new_results()]


@pytest.mark.parametrize("heartbeat", ["soon", None, [], 1e308, 9e9, -1e308])
def test_a_tuner_with_an_invalid_heartbeat_counts_as_dead(url: str, heartbeat: object) -> None:
    gone, second = shared_claims(url, 2)
    assert gone.claim(CONFIGS[5])
    gone._storage.set_study_user_attr(gone._study, f"worker {gone._tuner}", heartbeat)
    assert not second.others_have_claims()
    assert second.claim(CONFIGS[5])
    second.release()


def test_invalid_shared_results_are_ignored(url: str) -> None:
    first, second = shared_claims(url, 2)
    assert first.claim(CONFIGS[4])
    trial = first._claims[config_to_json(CONFIGS[4])]
    first._storage.set_trial_user_attr(trial, "result", '{"outcome": "ok"}')
    first.release()
    assert CONFIGS[4] not in [r.config for r in second.new_results()]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("tuning", "the storage is neither journal:FILE nor a URL"),
        ("journal:/nowhere/at/all", "cannot use the storage journal:/nowhere/at/all: "),
        ("oracle://u:secret@host/name", "the storage oracle://u:.*@host/name needs a driver that is not installed"),
        ("nonsense://host/name", "the storage nonsense://host/name needs a driver"),
        ("postgresql://u:secret@127.0.0.1:1/name", "cannot use the storage postgresql://u:.*@127.0.0.1:1/name: "),
    ],
)
def test_the_error_for_an_unusable_storage_hides_its_password(bad: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        Storage(bad).claims(JOB.place, "")
    assert "secret" not in str(caught.value)
