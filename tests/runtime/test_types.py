"""The return types of the public functions under strict type checking: no cast is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is of the lint extra")

TYPES = """
from torch import Tensor

from parallax_gen import GraphedDecode, State, parallax_attn_func, parallax_attn_varlen_func, parallax_attn_with_kvcache

Stats = tuple[Tensor, Tensor, Tensor, Tensor]


def attend(x: Tensor, starts: Tensor, flag: bool) -> None:
    out: Tensor = parallax_attn_func(x, x, x, x, causal=True, window_size=3)
    out = parallax_attn_func(x, x, x, x, return_stats=False, out=out)
    stats: Stats = parallax_attn_func(x, x, x, x, return_stats=True)
    either: Tensor | Stats = parallax_attn_func(x, x, x, x, return_stats=flag)
    out = parallax_attn_varlen_func(x, x, x, x, starts, starts, 3, max_seqlen_k=4, softmax_scale=0.5)
    stats = parallax_attn_varlen_func(x, x, x, x, starts, starts, 3, 4, return_stats=True)
    either = parallax_attn_varlen_func(x, x, x, x, starts, starts, 3, 4, return_stats=flag)
    out = parallax_attn_with_kvcache(x, x, x, x, cache_seqlens=3, k_scale=0.5)
    state: State = parallax_attn_with_kvcache(x, x, x, x, cache_seqlens=starts, return_state=True)
    one: Tensor | State = parallax_attn_with_kvcache(x, x, x, x, return_state=flag)
    out = GraphedDecode(x, x, x, x, cache_seqlens=starts)(x)
    state = GraphedDecode(x, x, x, x, return_state=True)()
    one = GraphedDecode(x, x, x, x, return_state=flag)()
    print(out, stats, either, state, one)
"""


def readme() -> str:
    """The first code block of the README."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return block[1]


# With our settings mypy takes what it knows of torch from the cache of the checkout's last `mypy`, as in .ci/run. Else
# it reads all of torch, which takes half a minute. As a user runs it, our settings do not count.
OURS = ["--config-file=pyproject.toml"]
A_USERS = ["--strict", "--config-file=", "--untyped-calls-exclude=torch", "--follow-imports=silent"]


@pytest.mark.parametrize(
    "options", [OURS, pytest.param(A_USERS, marks=pytest.mark.slow)], ids=["our settings", "a user's settings"]
)
def test_returned_types_need_no_cast_and_options_are_checked(options: list[str], tmp_path: Path) -> None:
    wrong = TYPES.replace("window_size=3", "windows=3").replace("k_scale=0.5", "k_scale='0.5'")
    files = {"right.py": f"{readme()}\n{TYPES}", "wrong.py": wrong.replace("stats: Stats =", "stats: Tensor =")}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    cache = [] if options is OURS else [f"--cache-dir={tmp_path / 'cache'}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *cache, *(str(tmp_path / name) for name in files)],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert "right.py" not in done.stdout, done.stdout + done.stderr
    for message in ("windows", "k_scale", "Incompatible types in assignment"):
        assert message in done.stdout
