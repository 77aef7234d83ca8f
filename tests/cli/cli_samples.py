"""Calls of the command line, and results for it to find."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

import parallax_gen
from parallax_gen.cli import main
from parallax_gen.codegen.render import templates_hash
from parallax_gen.memory import results
from parallax_gen.memory.keys import Environment, Key
from parallax_gen.problem.config import DecodeConfig, DkDvConfig
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec

H200 = gpu_by_name("h200")
SPEC = KernelSpec("decode", 128, "bf16", group=4)
SHAPE = "32,32/8,8192"
CALL = ("--gpu", "h200", "--op", "decode", "--shape", SHAPE)
KEY = Key.here("h200", SPEC, Bucket(256, 1, 8192), templates_hash(SPEC))

# A kernel of the backward, with a window.
DKDV_SPEC = KernelSpec("dkdv", 96, "bf16", group=4, causal=True, window=True)
DKDV_CALL = ("--gpu", "h200", "--op", "dkdv", "--head-dim", "96", "--window", "513", "--shape", "2,32/8,4096")
DKDV_KEY = Key.here("h200", DKDV_SPEC, Bucket(16, 4096, 4096, 512), templates_hash(DKDV_SPEC))


def elsewhere(**fields: Any) -> Key:
    """KEY in an environment that differs in these fields."""
    environment: Environment = dataclasses.replace(KEY.environment, **fields)
    return dataclasses.replace(KEY, environment=environment)


def config(splits: int) -> DecodeConfig:
    merge = "none" if splits == 1 else "last"
    return DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=splits, merge=merge, num_warps=1, num_stages=4)


def known(time_us: float | None = 250.0, outcome: str = "ok", splits: int = 2, **fields: Any) -> results.Result:
    """A result of KEY; give `key=` for another's."""
    values: dict[str, Any] = {"key": KEY, "created_at": "2026-01-01T00:00:00+00:00", "registers": 168, "spills": 0}
    return results.Result(config=config(splits), outcome=outcome, time_us=time_us, **(values | fields))


def known_dkdv(time_us: float | None = 900.0, outcome: str = "ok", stages: int = 2, **fields: Any) -> results.Result:
    """A result of DKDV_KEY."""
    config = DkDvConfig(64, 128, HEAD_GROUP=4, num_warps=8, num_stages=stages, HEAD_DIM_AS="pieces")
    values: dict[str, Any] = {"key": DKDV_KEY, "created_at": "2026-01-01T00:00:00+00:00"}
    return results.Result(config=config, outcome=outcome, time_us=time_us, **(values | fields))


def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
    """The command in this process."""
    return CliRunner(env=env).invoke(main, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def process(*command: object) -> subprocess.Popen[str]:
    """Python with this package on its path, as a child."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=Path(parallax_gen.__file__).parents[1],
    )
