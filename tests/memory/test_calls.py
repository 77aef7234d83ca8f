"""The file of recorded calls: what is written is read, calls add up, and nothing else in a file is accepted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import parallax_gen
from parallax_gen.errors import StoreError
from parallax_gen.memory.calls import add_calls, read_calls
from parallax_gen.problem.shapes import Bucket, Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec

FORWARD = KernelSpec("forward", 64, "bf16", group=4, causal=True, stats=True), Bucket(8, 2048, 2048)
WINDOWED = KernelSpec("dkdv", 96, "fp16", causal=True, window=True, softcap=True), Bucket(8, 2048, 2048, 512)
DECODE = KernelSpec("decode_varlen", 128, "bf16", 4, page_size=16, cache_dtype="e4m3"), Bucket(64, 1, 8192)
LINE = {"spec": FORWARD[0].to_dict(), "bucket": FORWARD[1].to_dict(), "calls": 3}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    counts = Counter({FORWARD: 3, WINDOWED: 1, DECODE: 2**40})
    add_calls(tmp_path / "new" / "calls.jsonl", counts)
    assert read_calls(tmp_path / "new" / "calls.jsonl") == counts
    first, *_ = (tmp_path / "new" / "calls.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(first)["calls"] == 2**40


def test_calls_add_up(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    add_calls(path, {FORWARD: 3})
    add_calls(path, {FORWARD: 4, DECODE: 1})
    assert read_calls(path) == Counter({FORWARD: 7, DECODE: 1})
    path.write_bytes(2 * path.read_bytes() + b"\n")  # joined with another machine's
    assert read_calls(path) == Counter({FORWARD: 14, DECODE: 2})


ADD = """
import sys
from pathlib import Path
from parallax_gen.memory.calls import add_calls, read_calls
path = Path(sys.argv[1])
(kernel,) = read_calls(path)
for _ in range(50):
    add_calls(path, {kernel: 1})
"""


def test_several_processes_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    add_calls(path, {FORWARD: 1})
    root = Path(parallax_gen.__file__).parents[1]
    children = [subprocess.Popen([sys.executable, "-c", ADD, str(path)], cwd=root) for _ in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert read_calls(path) == Counter({FORWARD: 151})
    assert {file.name for file in tmp_path.iterdir()} == {"calls.jsonl", ".calls.jsonl.lock"}


def changed(**fields: Any) -> str:
    return json.dumps({**LINE, **fields})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import os", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[]", "line: got []; allowed: an object with spec, bucket, calls"),
        (json.dumps({"spec": 1}), "line: got {'spec': 1}; allowed"),
        (changed(more=1), "line: got {"),
        (changed(spec="forward"), "spec: got 'forward'; allowed: an object"),
        (changed(spec={**LINE["spec"], "op": "eval"}), "op: got 'eval'; allowed"),  # type: ignore[dict-item]
        (changed(spec={**LINE["spec"], "op": ["forward"]}), "got ['forward']; allowed"),  # type: ignore[dict-item]
        (changed(bucket={"kv_rows": 3, "seqlen_q": 128, "seqlen_kv": 128}), "kv_rows: got 3; allowed: a power of two"),
        (changed(bucket={"kv_rows": 1, "seqlen_q": 64, "seqlen_kv": 64}), "bucket: got"),
        (changed(bucket={"kv_rows": 1, "seqlen_q": 128, "seqlen_kv": 128, "window": 128}), "bucket: got"),
        (changed(bucket={"kv_rows": 1 << 63, "seqlen_q": 128, "seqlen_kv": 128}), "kv_rows: got"),
        (changed(calls=0), "calls: got 0; allowed: an int from 1"),
        (changed(calls=True), "calls: got True"),
        (changed(calls=1.5), "calls: got 1.5"),
        (changed(calls=2**63), "calls: got 9223372036854775808"),
        ("\xff", ""),
    ],
)
def test_a_malformed_line_is_one_error_with_its_number(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    text = f"{json.dumps(LINE)}\n\n{line}\n".encode("latin-1")
    path.write_bytes(text)
    with pytest.raises(StoreError, match=re.escape(f"{path}, line 3: not a kernel and its calls: ")) as error:
        read_calls(path)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(StoreError, match="line 3"):  # so another file is never overwritten
        add_calls(path, {FORWARD: 1})
    assert path.read_bytes() == text


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read .*missing"):
        read_calls(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write .*calls"):
        add_calls(tmp_path / "file" / "calls", {FORWARD: 1})


def test_calls_of_any_sizes_can_be_read(tmp_path: Path) -> None:
    spec = KernelSpec("decode", 64, "bf16", group=2)
    shapes = [Shape(batch, 6, 3, 1, keys) for batch in (1, 7, 300) for keys in (1, 90, 129, 70_000)]
    counts = Counter((spec, bucket_of(shape)) for shape in shapes)
    add_calls(tmp_path / "calls", counts)
    assert read_calls(tmp_path / "calls") == counts
