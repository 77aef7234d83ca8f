"""Errors on peaked inputs: the weights of their inputs, and the rows of kernels that are exact and inexact there."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallax_gen.bench import compare as comparing
from parallax_gen.bench.baselines import BASELINES, OURS
from parallax_gen.bench.baselines.base import AttentionCall, Baseline, Step, gradient_of_output, leaves
from parallax_gen.bench.compare import compare
from parallax_gen.bench.oracle_check import peaked_inputs
from parallax_gen.bench.rows import Effort, Row
from parallax_gen.bench.summary import largest_errors
from parallax_gen.codegen.abi import Inputs
from parallax_gen.errors import MeasureError
from parallax_gen.oracle.accuracy import tolerance
from parallax_gen.oracle.inputs import attend
from parallax_gen.oracle.peaked import FEWEST_KEYS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import TRAINING
from parallax_gen.tuning.workers.messages import Timing

DECODE, DECODE_SHAPE = KernelSpec("decode", 128, "bf16", group=2), Shape(8, 4, 2, 1, 300)
VARLEN = replace(DECODE, op="decode_varlen")
FORWARD = KernelSpec("forward", 128, "bf16", group=2, causal=True)
STEP, STEP_SHAPE = replace(FORWARD, stats=True), Shape(2, 4, 2, 64, 64)
# Ours is the oracle here. Rounded to bf16 an element is off by up to 2^-9 of it, and the norm by about 1.7e-3.
ROUNDED = 2e-3


@pytest.fixture(autouse=True)
def _same_inputs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(1)
    monkeypatch.setattr(comparing, "DEVICE", "cpu")
    monkeypatch.setattr(comparing, "time_call", lambda *_, **__: Timing(100.0, 99.0, 102.0, 20, 7))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.fixture
def compare_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """Compare ours with one baseline."""

    def compare_with(baseline: Baseline, *case: Any, **options: Any) -> list[Row]:
        monkeypatch.setattr(comparing, "baselines_of", lambda op: [BASELINES[OURS], baseline])
        return compare(*case, **options)

    return compare_with


def rounded_products(spec: KernelSpec, x: Inputs, q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A kernel that rounds p and p t for the matmul with v, and sums them unrounded: see oracle/peaked.py."""
    q, r, k, v = (t.double() for t in (q, r, k, v))
    k, v = (t.repeat_interleave(spec.group, dim=2) for t in (k, v))
    s, t = (torch.einsum("bihd,bjhd->bhij", y, k) for y in (q * spec.head_dim**-0.5, r))
    if spec.causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
    p = (s - s.amax(-1, keepdim=True)).exp()
    total = p.sum(-1, keepdim=True)
    w = 1 + (p * t).sum(-1, keepdim=True) / total
    p, pt = (y.to(x.q.dtype).double() for y in (p, p * t))
    return ((w * (p @ v.transpose(1, 2)) - pt @ v.transpose(1, 2)) / total).transpose(1, 2).to(x.q.dtype)


def rounding_call(spec: KernelSpec, x: Inputs) -> AttentionCall:
    return lambda: rounded_products(spec, x, x.q, x.r, x.k, x.v)


def rounding_step(spec: KernelSpec, x: Inputs) -> Step:
    qrkv = leaves(x.q, x.r, x.k, x.v)
    return Step(lambda: rounded_products(spec, x, *qrkv), qrkv, gradient_of_output(x))


INEXACT = Baseline("fla", rounding_call, rounding_call, rounding_step)


def fails_on_peaked_rows(failure: Exception) -> Baseline:
    """A baseline whose second call raises: the first is on the usual inputs."""
    calls = 0

    def decode(spec: KernelSpec, x: Inputs) -> AttentionCall:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise failure
        return rounding_call(spec, x)

    return Baseline("fla", decode=decode)


@pytest.mark.parametrize(
    ("spec", "shape", "lengths"),
    [
        (FORWARD, Shape(1, 4, 2, 200, 200), ()),
        (replace(FORWARD, causal=False), Shape(1, 4, 2, 200, 200), ()),
        (replace(FORWARD, window=True), Shape(1, 4, 2, 200, 200, 50), ()),
        (replace(FORWARD, varlen=True), Shape(2, 4, 2, 90, 90), ()),
        (DECODE, Shape(2, 4, 2, 1, 16384), ()),
        (replace(DECODE, head_dim=64), Shape(2, 4, 2, 1, 16384), ()),
        (VARLEN, Shape(2, 4, 2, 1, 4096), (2000, 30)),
        (replace(VARLEN, page_size=16), Shape(2, 4, 2, 1, 4096), (2000, 30)),
        (replace(VARLEN, cache_dtype="e4m3"), Shape(2, 4, 2, 1, 4096), ()),
        (replace(VARLEN, window=True, multi_token=True, causal=True), Shape(2, 4, 2, 3, 1024, 100), ()),
    ],
    ids=str,
)
def test_one_key_has_most_of_the_weight(spec: KernelSpec, shape: Shape, lengths: tuple[int, ...]) -> None:
    """The sum of p^2, which is at most the largest p, from lse and the lse of doubled scores."""
    x = peaked_inputs("forward" if spec.op == "forward" else "decode", spec, shape, "cpu", lengths)
    lse_of_doubled = attend(spec, replace(x, q=2 * x.q)).lse
    sum_of_squares = (lse_of_doubled - 2 * attend(spec, x).lse).exp()
    assert sum_of_squares.median() > 0.5


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (FORWARD, Shape(1, 4, 2, 200, 200)),
        (replace(FORWARD, causal=False), Shape(1, 4, 2, 200, 200)),
        (replace(FORWARD, window=True), Shape(1, 4, 2, 200, 200, 50)),
        (replace(FORWARD, window=True), Shape(1, 4, 2, 16, 16, 500)),  # all keys are in the window
        (DECODE, Shape(8, 4, 2, 1, 300)),
        (replace(VARLEN, window=True, multi_token=True, causal=True), Shape(2, 4, 2, 3, 300, 100)),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["forward", "training"])
def test_the_key_is_no_reference_of_an_exponential(op: str, spec: KernelSpec, shape: Shape) -> None:
    """Of the rows that see more than half of the keys: neither the first key nor the row's last has the weight."""
    x = peaked_inputs(op if spec.op == "forward" else "decode", spec, shape, "cpu")
    s = torch.einsum("bihd,bjhd->bhij", x.q.float(), x.k.float().repeat_interleave(2, dim=2))
    last = torch.arange(shape.seqlen_kv - shape.seqlen_q, shape.seqlen_kv)
    if spec.causal:
        s = s.masked_fill(torch.arange(shape.seqlen_kv) > last[:, None], -torch.inf)
    if spec.window:
        s = s.masked_fill(torch.arange(shape.seqlen_kv) <= last[:, None] - shape.window, -torch.inf)
    key, late = s.argmax(-1), last > shape.seqlen_kv // 2
    assert ((key > 0) & (key < last))[..., late].float().mean() > 0.9


@pytest.mark.parametrize("extent", ["whole", "sample"])
@pytest.mark.parametrize("op", ["forward", "decode"])
def test_a_kernel_that_is_inexact_on_peaked_rows(compare_with: Callable[..., list[Row]], op: str, extent: str) -> None:
    case = (FORWARD, STEP_SHAPE) if op == "forward" else (DECODE, DECODE_SHAPE)
    ours, inexact = compare_with(INEXACT, op, *case, effort=Effort(oracle=extent))
    assert ours.error is not None
    assert ours.error < ROUNDED
    assert ours.peaked_error is not None
    assert ours.peaked_error < ROUNDED
    assert inexact.error is not None
    assert inexact.error < tolerance("bf16")
    assert inexact.peaked_error is not None
    assert inexact.peaked_error > 4 * ROUNDED


def test_of_a_training_step_the_output_is_compared(compare_with: Callable[..., list[Row]]) -> None:
    rows = compare_with(INEXACT, TRAINING, STEP, STEP_SHAPE)
    assert [row.peaked_error is None for row in rows] == [False, True, False] * 2
    for ours, inexact in ((rows[0], rows[3]), (rows[2], rows[5])):
        assert ours.peaked_error < ROUNDED  # type: ignore[operator]
        assert inexact.peaked_error > 4 * ROUNDED  # type: ignore[operator]


@pytest.mark.parametrize(
    ("spec", "lengths"),
    [
        (VARLEN, (300, 40) * 4),
        (replace(VARLEN, page_size=16), (300, 40) * 4),
        (replace(VARLEN, cache_dtype="e4m3"), ()),
        (replace(DECODE, softcap=True), ()),
    ],
    ids=str,
)
def test_caches_of_every_kind_have_the_error(spec: KernelSpec, lengths: tuple[int, ...]) -> None:
    (row,) = compare("decode", spec, DECODE_SHAPE, (OURS,), lengths=lengths)
    assert row.peaked_error is not None
    assert 0 < row.peaked_error < ROUNDED


def test_packed_sequences_have_the_error() -> None:
    rows = compare(TRAINING, replace(STEP, varlen=True), STEP_SHAPE, (OURS,))
    assert all(row.peaked_error < ROUNDED for row in rows if row.part != "backward")  # type: ignore[operator]


def test_without_an_error_there_is_none_on_peaked_rows(compare_with: Callable[..., list[Row]]) -> None:
    softmax = replace(INEXACT, name="SDPA flash", softmax=True)
    ours, other = compare_with(softmax, "decode", DECODE, DECODE_SHAPE)
    assert (ours.peaked_error is None, other.peaked_error) == (False, None)
    without_oracle = compare_with(INEXACT, "decode", DECODE, DECODE_SHAPE, effort=Effort(oracle="none"))
    assert [row.peaked_error for row in without_oracle] == [None, None]


@pytest.mark.parametrize("keys", [FEWEST_KEYS - 1, FEWEST_KEYS])
def test_few_keys_have_no_peaked_rows(keys: int) -> None:
    (row,) = compare("decode", DECODE, Shape(2, 4, 2, 1, keys), (OURS,))
    assert row.error is not None
    assert (row.peaked_error is None) == (keys < FEWEST_KEYS)


@pytest.mark.parametrize(
    "failure", [ValueError("out of luck"), torch.OutOfMemoryError("CUDA out of memory")], ids=["fails", "out of memory"]
)
def test_a_baseline_that_fails_on_peaked_rows_keeps_its_time(
    compare_with: Callable[..., list[Row]], failure: Exception
) -> None:
    ours, other = compare_with(fails_on_peaked_rows(failure), "decode", DECODE, DECODE_SHAPE)
    assert (other.time_us, other.note, other.peaked_error) == (100.0, "", None)
    assert other.error is not None
    assert ours.peaked_error is not None


def test_without_memory_for_peaked_rows_the_times_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> Inputs:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    monkeypatch.setattr(comparing, "peaked_inputs", too_large)
    (row,) = compare("decode", DECODE, DECODE_SHAPE, (OURS,))
    assert (row.time_us, row.note, row.peaked_error) == (100.0, "", None)
    assert row.error is not None


def test_a_baseline_that_breaks_the_device_on_peaked_rows_is_named(
    monkeypatch: pytest.MonkeyPatch, compare_with: Callable[..., list[Row]]
) -> None:
    failure = RuntimeError("an illegal memory access was encountered")
    synchronized = 0

    def synchronize() -> None:
        nonlocal synchronized
        synchronized += 1
        if synchronized > 3:  # after the two usual calls and our peaked one
            raise failure

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(MeasureError, match=r"fla left the device unusable .*illegal.*: run again with --skip 'fla'"):
        compare_with(fails_on_peaked_rows(failure), "decode", DECODE, DECODE_SHAPE)


def test_the_largest_errors_of_a_file() -> None:
    row = Row("fla", "decode", "decode", DECODE, DECODE_SHAPE, 10.0, 1.0, 2e-3)
    longer, again = replace(row, shape=Shape(8, 4, 2, 1, 400)), replace(row, error=5e-3, peaked_error=2e-2)
    peer, softmax = replace(row, baseline="parallax_gen"), replace(row, baseline="SDPA flash", error=None)
    errors = largest_errors([again, row, longer, replace(peer, peaked_error=1e-3), softmax], lambda row: row.baseline)
    assert errors == {"fla": (2e-3, None), "parallax_gen": (2e-3, 1e-3)}  # of duplicate rows the last one counts
    assert largest_errors([row, replace(again, shape=longer.shape)], lambda row: row.op) == {"decode": (5e-3, 2e-2)}
