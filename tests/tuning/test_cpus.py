"""The number of CPUs that the tuner may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parallax_gen.tuning.workers import pool
from parallax_gen.tuning.workers.pool import usable_cpus


def test_cpus_of_the_affinity_mask() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


def write_files(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("membership", "groups", "cpus"),
    [
        ("0::/\n", {".": {"cpu__max": "max 100000\n"}}, 16),
        ("0::/\n", {".": {"cpu__max": "250000 100000\n"}}, 3),  # two and a half
        ("0::/\n", {".": {"cpu__max": "10000 100000\n"}}, 1),
        ("0::/pod/me\n", {"pod": {"cpu__max": "200000 100000\n"}, "pod/me": {"cpu__max": "max 100000\n"}}, 2),
        ("0::/of/the/host\n", {".": {"cpu__max": "400000 100000\n"}}, 4),
        (
            "5:memory:/m\n4:cpu,cpuacct:/me\n0::/\n",
            {"cpu,cpuacct/me": {"cpu__cfs_quota_us": "300000\n", "cpu__cfs_period_us": "100000\n"}},
            3,
        ),
        ("1:cpu:/\n", {"cpu": {"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"}}, 16),
        ("0::/\n", {".": {"cpu__max": "no number\n"}}, 16),
        (None, {}, 16),
    ],
)
def test_cpus_of_the_containers_quota(
    membership: str | None,
    groups: dict[str, dict[str, str]],
    cpus: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for folder, files in groups.items():
        write_files(tmp_path / "cgroup" / folder, **files)
    if membership is not None:
        write_files(tmp_path, self=membership)
    monkeypatch.setattr(pool, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(pool, "MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    assert usable_cpus() == cpus
