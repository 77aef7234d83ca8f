"""A copy of the package with faults injected into some preprocess kernels, which a tune must survive."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from parallax_gen.files import PACKAGE, data_dir
from parallax_gen.memory.result import Result
from parallax_gen.memory.store import Store

# By (BLOCK_M, num_warps): the injected fault, and the expected outcomes with and without a GPU.
FAULTS = {
    (4, 1): ("an illegal access", "crash", "predicted"),
    (8, 1): ("an endless loop", "timeout", "predicted"),
    (16, 1): ("a wrong result", "wrong", "predicted"),
    (32, 2): ("a compilation that hangs", "timeout", "timeout"),
}
KERNEL_FAULTS = """
    {% if config.num_warps == 1 and config.BLOCK_M == 4 %}
    tl.store(row_stats_ptr + (1 << 42) + offs_m, lse)
    {% elif config.num_warps == 1 and config.BLOCK_M == 8 %}
    old = 0
    while old != -7:
        old = tl.atomic_add(row_stats_ptr.to(tl.pointer_type(tl.int32)), 1)
    {% elif config.num_warps == 1 and config.BLOCK_M == 16 %}
    lse2 += 1.0
    {% endif %}
    tl.store(stat_ptrs, lse2)
"""
IMPORT_FAULT = """
{% if config.num_warps == 2 and config.BLOCK_M == 32 %}
import time

time.sleep(1e6)
{% endif %}

@triton.jit("""
SHORT_TIMEOUTS = {"COMPILE_TIMEOUT_S": "30.0", "MEASURE_TIMEOUT_S": "60.0", "CACHED_TIMEOUT_S": "15.0"}


def tune_with_faults(folder: Path) -> tuple[dict[str, Any], list[Result]]:
    """Tune a small preprocess job: the command's JSON and all records."""
    shutil.copytree(PACKAGE, folder / "parallax_gen")
    for name in ("templates", "tuning_db"):
        shutil.copytree(data_dir(name), folder / name, dirs_exist_ok=True)
    template = folder / "templates" / "preprocess.py.j2"
    text = template.read_text(encoding="utf-8")
    for old, new in (
        ("\n    tl.store(stat_ptrs, lse2)\n", KERNEL_FAULTS),
        ("\n@triton.jit(", IMPORT_FAULT),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    template.write_text(text, encoding="utf-8")
    pool = folder / "parallax_gen" / "tuning" / "workers" / "pool.py"
    lines = pool.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, seconds in SHORT_TIMEOUTS.items():
        (at,) = [n for n, line in enumerate(lines) if line.startswith(f"{name} = ")]
        lines[at] = f"{name} = {seconds}\n"
    pool.write_text("".join(lines), encoding="utf-8")
    database = folder / "tuning.db"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"PYTHONPATH": paths, "PARALLAX_GEN_DB": str(database)}
    arguments = ["--gpu", "h200"] if "CUDA_VISIBLE_DEVICES" in os.environ else []
    call = ["tune", *arguments, "--op", "preprocess", "--shape", "1,4,512", "--time-budget", "400", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "parallax_gen.cli", *call],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    with Store(database, read_only=True) as store:
        return json.loads(done.stdout), store.all()


def outcomes(results: list[Result]) -> dict[tuple[int, int], str]:
    """Outcomes of the configs with injected faults. Every other config must have worked."""
    faulty = {}
    for result in results:
        config: Any = result.config
        place = (config.BLOCK_M, config.num_warps)
        if place in FAULTS:
            faulty[place] = result.outcome
        else:
            assert result.outcome in ("ok", "slow", "predicted"), result
    return faulty
