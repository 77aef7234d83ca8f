"""Command lines for the tests, and records that they look up."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

import parallax_gen
from parallax_gen.cli import main
from parallax_gen.codegen.render import render
from parallax_gen.errors import ConfigError
from parallax_gen.memory import ranking, result
from parallax_gen.memory.descriptions import card_of
from parallax_gen.memory.place import Place
from parallax_gen.memory.result import Evidence
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec

H200 = gpu_by_name("h200")
SPEC = KernelSpec("decode", 128, "bf16", group=4)
SHAPE = "32,32/8,8192"
CALL = ("--gpu", "h200", "--op", "decode", "--shape", SHAPE)
PLACE = Place("h200", SPEC, Bucket(256, 1, 8192))

# A kernel of the backward, with a window.
DKDV_SPEC = KernelSpec("dkdv", 96, "bf16", group=4, causal=True, window=True)
DKDV_CALL = ("--gpu", "h200", "--op", "dkdv", "--head-dim", "96", "--window", "513", "--shape", "2,32/8,4096")
DKDV_PLACE = Place("h200", DKDV_SPEC, Bucket(16, 4096, 4096, 512))

# Evidence that differs from today's: another kernel, or another toolchain.
OTHER_KERNEL = {"kernel": "0" * 32, "text": "0" * 32}
OTHER_TOOLCHAIN = {"triton": "3.4.1", "cuda": "12.4"}  # older than any that is supported
NOTHING: Mapping[str, Any] = {}


def evidence(place: Place, config: KernelConfig, **evidence_changes: Any) -> Evidence:
    """The evidence of a measurement of today's kernel in this process, except for the given fields."""
    try:
        here = ranking.evidence_of(render(place.spec, config, card_of(place)))
    except ConfigError:  # no kernel today: the config is not valid any more
        here = Evidence.here(**OTHER_KERNEL)
    return dataclasses.replace(here, **evidence_changes)


def config(splits: int) -> DecodeConfig:
    merge = "none" if splits == 1 else "last"
    return DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=splits, merge=merge, num_warps=1, num_stages=4)


def dkdv_config(stages: int = 2) -> DkDvConfig:
    return DkDvConfig(
        64, 128, 4, 8, num_stages=stages, HEAD_DIM_LAYOUT="chunked", LOADS="descriptors", QR_TILE="stacked"
    )


def make_record(
    time_us: float | None = 250.0,
    outcome: str = "ok",
    splits: int = 2,
    evidence_changes: Mapping[str, Any] = NOTHING,
    **fields: Any,
) -> result.Result:
    """A result of PLACE, or of `place=`. `evidence_changes`: fields of its evidence that differ from today's."""
    return _make_record(
        time_us,
        outcome,
        evidence_changes,
        {"place": PLACE, "config": config(splits), "registers": 168, "spills": 0} | fields,
    )


def dkdv_record(
    time_us: float | None = 900.0,
    outcome: str = "ok",
    stages: int = 2,
    evidence_changes: Mapping[str, Any] = NOTHING,
    **fields: Any,
) -> result.Result:
    """A result of DKDV_PLACE."""
    return _make_record(
        time_us, outcome, evidence_changes, {"place": DKDV_PLACE, "config": dkdv_config(stages)} | fields
    )


def _make_record(
    time_us: float | None, outcome: str, evidence_changes: Mapping[str, Any], fields: dict[str, Any]
) -> result.Result:
    actual = {
        "evidence": evidence(fields["place"], fields["config"], **evidence_changes),
        "created_at": "2026-01-01T00:00:00+00:00",
    }
    return result.Result(outcome=outcome, time_us=time_us, **(actual | fields))


def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
    """Run the command in this process, in a pipe without a width (pytest-xdist sets COLUMNS in its workers)."""
    variables: dict[str, str | None] = {"COLUMNS": None, **(env or {})}
    return CliRunner(env=variables).invoke(main, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def start_python(*command: object) -> subprocess.Popen[str]:
    """Start Python in a child process with this package on its path, and pipes without a width, as in `run`."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=Path(parallax_gen.__file__).parents[1],
        env={name: value for name, value in os.environ.items() if name != "COLUMNS"},
    )
