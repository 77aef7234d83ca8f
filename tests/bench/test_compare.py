"""How baselines are compared: ours on the CPU, others faked by the reference in their layouts, and a fake clock."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallax_gen.bench import compare as comparing
from parallax_gen.bench.baselines import BASELINES, OURS
from parallax_gen.bench.baselines.base import Baseline
from parallax_gen.bench.compare import compare
from parallax_gen.bench.oracle_check import OracleCheck, random_inputs_for_case
from parallax_gen.bench.parts import PARTS
from parallax_gen.bench.rows import Effort, Row
from parallax_gen.errors import MeasureError
from parallax_gen.oracle.accuracy import tolerance
from parallax_gen.oracle.reference import reference_forward
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import work_of
from parallax_gen.problem.workloads import TRAINING
from parallax_gen.tuning.workers.messages import Timing

STEP = KernelSpec("forward", 64, "bf16", group=2, causal=True, stats=True)
SHAPE = Shape(2, 4, 2, 40, 40)
WINDOWED = KernelSpec("forward", 64, "bf16", group=2, causal=True, stats=True, window=True)
WINDOW_SHAPE = Shape(2, 4, 2, 40, 40, 9)


class Clock:
    """A fake clock: every call takes `us`, and some calls cannot be captured in a CUDA graph."""

    def __init__(self) -> None:
        self.us = 100.0
        self.uncapturable: set[str] = set()
        self.in_bursts: list[bool] = []

    def time_call(self, call: Callable[[], object], *, timed_ms: float, give_up_us: float, in_bursts: bool) -> Timing:
        call()
        self.in_bursts.append(in_bursts)
        if getattr(call, "__name__", "") in self.uncapturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Timing(self.us, self.us - 1, self.us + 2, 20, 7)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Run everything on the CPU with the fake clock."""
    clock = Clock()
    monkeypatch.setattr(comparing, "time_call", clock.time_call)
    monkeypatch.setattr(comparing, "time_eagerly", lambda call, calls: Timing(300.0, 290.0, 310.0, 1, calls))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(comparing, "DEVICE", "cpu")
    return clock


def rows_of(rows: list[Row], name: str) -> dict[str, Row]:
    return {row.part: row for row in rows if row.baseline == name}


def fake_parallax_kernel(attend: Callable[..., Tensor]) -> ModuleType:
    """A fake of the parts of parallax.triton that bench uses, in its layout: (batch * heads, seqlen, head_dim)."""

    def apply(q: Tensor, r: Tensor, k: Tensor, v: Tensor, scale: float, n_rep: int, window_size_left: int) -> Tensor:
        assert (scale, n_rep) == (64**-0.5, 2)
        assert all(x.dim() == 3 and x.is_contiguous() for x in (q, r, k, v))
        window = None if window_size_left == -1 else window_size_left
        # Each head becomes a sequence with one head, and with the kv head of its group.
        keys, values = (x.repeat_interleave(n_rep, 0)[:, :, None] for x in (k, v))
        return attend(q[:, :, None], r[:, :, None], keys, values, window)[:, :, 0]

    def parallax_fwd(*inputs: Any, n_rep: int, window_size_left: int) -> tuple[Tensor]:
        return (apply(*inputs, n_rep, window_size_left),)

    module = ModuleType("parallax.triton")
    module.ParallaxFunction = SimpleNamespace(apply=apply)  # type: ignore[attr-defined]
    module.parallax_fwd = parallax_fwd  # type: ignore[attr-defined]
    return module


def fake_fla(attend: Callable[..., Tensor]) -> ModuleType:
    """A fake package. Packed sequences are one batch entry."""

    def parallel_parallax(
        q: Tensor, r: Tensor, k: Tensor, v: Tensor, window_size: int | None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        if cu_seqlens is None:
            return attend(q, r, k, v, window_size)
        assert len(q) == 1
        assert cu_seqlens.dtype == torch.int64
        ends = cu_seqlens.tolist()
        parts = [[x[:, a:b] for x in (q, r, k, v)] for a, b in itertools.pairwise(ends)]
        return torch.cat([attend(*part, window_size) for part in parts], 1)

    module = ModuleType("fla.ops.parallax.parallel")
    module.parallel_parallax = parallel_parallax  # type: ignore[attr-defined]
    return module


def exact(q: Tensor, r: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    return reference_forward(q, r, k, v, causal=True, window_size=window).out.to(q.dtype)


def window_off_by_one(q: Tensor, r: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    return exact(q, r, k, v, window and window + 1)


@pytest.fixture
def _fake_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "parallax.triton", fake_parallax_kernel(exact))
    monkeypatch.setitem(sys.modules, "fla.ops.parallax.parallel", fake_fla(exact))


@pytest.mark.usefixtures("_fake_baselines")
@pytest.mark.parametrize(("spec", "shape"), [(STEP, SHAPE), (WINDOWED, WINDOW_SHAPE)], ids=["causal", "window"])
def test_a_step_and_its_errors(clock: Clock, spec: KernelSpec, shape: Shape) -> None:
    rows = compare(TRAINING, spec, shape, ("parallax_gen", "parallax-kernel Triton", "fla"))
    assert len(rows) == 9
    for row in rows:
        assert (row.op, row.spec, row.shape, row.time_us, row.note) == (TRAINING, spec, shape, 100.0, "")
        assert row.error is not None
        assert 1e-5 < row.error < tolerance("bf16")  # the rounding of the output
    for name in ("parallax_gen", "parallax-kernel Triton", "fla"):
        result = {part: row.error for part, row in rows_of(rows, name).items()}
        assert result["forward"] != result["backward"]
        assert result["step"] == max(result["forward"], result["backward"])  # type: ignore[type-var]
    assert all(clock.in_bursts)


@pytest.mark.usefixtures("_fake_baselines")
def test_a_wrong_result_has_a_large_error(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setitem(sys.modules, "parallax.triton", fake_parallax_kernel(window_off_by_one))
    rows = compare(TRAINING, WINDOWED, WINDOW_SHAPE, ("parallax-kernel Triton", "fla"))
    for part in PARTS[TRAINING]:
        assert rows_of(rows, "parallax-kernel Triton")[part].error > 0.05  # type: ignore[operator]
        assert rows_of(rows, "fla")[part].error < tolerance("bf16")  # type: ignore[operator]


@pytest.mark.usefixtures("_fake_baselines")
@pytest.mark.parametrize("varlen", [False, True])
def test_baselines_without_packed_sequences_have_a_note(clock: Clock, varlen: bool) -> None:
    spec = KernelSpec("forward", 64, "bf16", group=2, causal=True, stats=True, varlen=varlen)
    rows = compare(TRAINING, spec, SHAPE)
    assert all(row.time_us and row.error < tolerance("bf16") for row in rows_of(rows, "parallax_gen").values())  # type: ignore[operator]
    for name in ("parallax-kernel Triton", "SDPA flash"):
        notes = {row.note.partition(":")[0] for row in rows_of(rows, name).values()}
        assert (notes == {"not supported"}) is varlen
    assert all(row.time_us and row.error < tolerance("bf16") for row in rows_of(rows, "fla").values())  # type: ignore[operator]


@pytest.mark.usefixtures("_fake_baselines")
def test_fla_is_refused_packed_prompts_with_caches() -> None:
    spec = KernelSpec("forward", 64, "bf16", group=2, causal=True, varlen=True)
    x = random_inputs_for_case("forward", spec, Shape(2, 4, 2, 24, 40), "cpu")
    with pytest.raises(NotImplementedError, match="as many queries as keys"):
        BASELINES["fla"].prepare("forward", spec, x)


def test_rounding_of_a_zero_gradient_is_no_error() -> None:
    oracle_check = OracleCheck(TRAINING, STEP, SHAPE, random_inputs_for_case(TRAINING, STEP, SHAPE, "cpu"), "whole")
    oracle_check._expected["dq"] = zeros = torch.zeros_like(oracle_check._expected["dq"])
    assert oracle_check.errors({"dq": zeros + 1e-6})["dq"] < 1e-4


def test_rates_count_the_work_of_each_part(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    ours = BASELINES[OURS]
    softmax = Baseline("softmax", step=ours.step, softmax=True)
    monkeypatch.setattr(comparing, "baselines_of", lambda op: [ours, softmax])
    rows = compare(TRAINING, STEP, SHAPE)
    pairs = 2 * 4 * 40 * 40 / 2 * 64  # batch, heads, half a square of visible pairs, head_dim
    assert work_of(STEP, SHAPE).flops == 8 * pairs
    for name, flops in (("parallax_gen", (8, 16, 24)), ("softmax", (4, 10, 14))):
        result = [row.rate for row in rows_of(rows, name).values()]
        assert result == pytest.approx([n * pairs / 100.0 / 1e6 for n in flops])
    assert [row.error for row in rows_of(rows, "softmax").values()] == [None] * 3


def test_uncapturable_calls_are_timed_without_a_graph(clock: Clock) -> None:
    clock.uncapturable = {"backward"}
    result = rows_of(compare(TRAINING, STEP, SHAPE, ("parallax_gen",)), "parallax_gen")
    assert (result["backward"].time_us, result["backward"].note) == (300.0, "without a CUDA graph")
    assert (result["forward"].time_us, result["forward"].note) == (100.0, "")


def test_a_failing_baseline_is_a_row_and_our_failure_an_error(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    def fail(*_: object) -> Any:
        raise ValueError("out of luck\nand more")

    monkeypatch.setitem(sys.modules, "parallax.triton", fake_parallax_kernel(fail))
    monkeypatch.setitem(sys.modules, "fla.ops.parallax.parallel", None)
    rows = compare(TRAINING, STEP, SHAPE, ("parallax-kernel Triton", "fla"))
    assert {row.note for row in rows_of(rows, "parallax-kernel Triton").values()} == {"ValueError: out of luck"}
    assert {row.note for row in rows_of(rows, "fla").values()} == {"not installed"}
    assert not any(row.time_us for row in rows)
    monkeypatch.setattr(comparing, "baselines_of", lambda op: [Baseline("parallax_gen", step=fail)])
    with pytest.raises(ValueError, match="out of luck"):
        compare(TRAINING, STEP, SHAPE)


def test_a_failing_softmax_baseline_is_a_row(clock: Clock) -> None:
    """It is not compared with the oracle, but it is called once before it is timed."""
    rows = compare("forward", KernelSpec("forward", 64, "bf16", causal=True), Shape(1, 2, 2, 40, 40), ("SDPA cuDNN",))
    assert [row.time_us for row in rows] == [None]
    assert rows[0].note


@pytest.mark.usefixtures("_fake_baselines")
@pytest.mark.parametrize("window", [0, 9])
def test_forward_alone(clock: Clock, window: int) -> None:
    spec = KernelSpec("forward", 64, "bf16", group=2, causal=True, window=window > 0)
    rows = compare("forward", spec, Shape(2, 4, 2, 40, 40, window))
    for name in ("parallax_gen", "parallax-kernel Triton", "fla"):
        (row,) = rows_of(rows, name).values()
        assert row.error is not None
        assert row.error < tolerance("bf16")
    assert rows_of(rows, "SDPA flash")["forward"].note == ("not supported: no window" if window else "")


def test_softmax_is_skipped_if_its_mask_differs(clock: Clock) -> None:
    spec = KernelSpec("forward", 64, "bf16", causal=True)
    (row,) = compare("forward", spec, Shape(1, 2, 2, 40, 90), ("SDPA flash",))
    assert row.note == "not supported: its causal mask is aligned to the first key"


def test_decode(clock: Clock) -> None:
    spec, shape = KernelSpec("decode", 64, "bf16", group=2), Shape(2, 4, 2, 1, 300)
    (row,) = compare("decode", spec, shape, ("parallax_gen",))
    assert row.error is not None
    assert row.error < tolerance("bf16")
    assert row.rate == pytest.approx(work_of(spec, shape).bytes / 100.0 / 1e3)
    assert not any(clock.in_bursts)


LENGTHS = (300, 9, 40)


@pytest.mark.parametrize("page_size", [0, 16])
def test_lengths_are_passed_checked_and_counted(clock: Clock, monkeypatch: pytest.MonkeyPatch, page_size: int) -> None:
    inputs: list[Tensor] = []

    def attend(q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, seqused_k: Tensor, out: Tensor) -> Tensor:
        inputs.append(seqused_k)
        assert not k.isnan().any()
        for i, keys in enumerate(seqused_k.tolist()):
            row = (q[i : i + 1], r[i : i + 1], k[i : i + 1, :keys], v[i : i + 1, :keys])
            out[i] = reference_forward(*row, causal=False).out[0].to(q.dtype)
        return out

    fake_parallax_kernel = ModuleType("parallax.cute")
    fake_parallax_kernel.parallax_attn_with_kvcache = attend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "parallax.cute", fake_parallax_kernel)
    spec = KernelSpec("decode_varlen", 64, "bf16", group=2, page_size=page_size)
    shape, names = Shape(3, 4, 2, 1, 300), ("parallax_gen", "SDPA flash", "parallax-kernel CuTeDSL")
    ours, softmax, peer = compare("decode", spec, shape, names, lengths=LENGTHS)
    assert {row.lengths for row in (ours, softmax, peer)} == {LENGTHS}
    moved = 2 * 64 * (2 * 2 * sum(LENGTHS) + 3 * 3 * 4)
    assert ours.rate == pytest.approx(moved / 100.0 / 1e3)
    assert ours.error is not None
    assert ours.error < tolerance("bf16")
    assert softmax.note == "not supported: no per-sequence lengths"
    if page_size:
        assert peer.note == "not supported: no pages"
        return
    assert {tuple(lengths.tolist()) for lengths in inputs} == {LENGTHS}
    assert peer.error is not None
    assert peer.error < tolerance("bf16")
    assert peer.rate == ours.rate


def test_tf32_follows_torch_settings() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for dtype, says in (("tf32", "tf32"), ("fp32", "ieee")):
        with comparing._matmul_precision(KernelSpec("forward", 64, dtype)):
            assert matmul.fp32_precision == says
        assert matmul.fp32_precision == before


# few calls for slow baselines, and failures on a card


def fake_baselines(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    """Baselines with our decode under these names; returns how often each was timed."""
    ours, timings = BASELINES[OURS], dict.fromkeys(names, 0)
    monkeypatch.setattr(comparing, "baselines_of", lambda op: [Baseline(name, decode=ours.decode) for name in names])
    return timings


DECODE, DECODE_SHAPE = KernelSpec("decode", 64, "bf16", group=2), Shape(2, 4, 2, 1, 300)


@pytest.mark.parametrize(("few_calls", "times"), [(True, 1), (False, 3)])
def test_with_few_calls_slow_baselines_are_timed_once(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, few_calls: bool, times: int
) -> None:
    timings = fake_baselines(monkeypatch, "parallax_gen", "quick one", "slow one")
    limits: list[float] = []
    takes = iter([100.0, 250.0, 350.0] + [100.0, 250.0] * 2 if few_calls else [100.0, 250.0, 350.0] * 3)

    def time_call(call: object, *, timed_ms: float, give_up_us: float, in_bursts: bool) -> Timing:
        limits.append(give_up_us)
        us = next(takes)
        timings[{100.0: "parallax_gen", 250.0: "quick one", 350.0: "slow one"}[us]] += 1
        return Timing(us, us, us, 1, 7)

    monkeypatch.setattr(comparing, "time_call", time_call)
    rows = compare("decode", DECODE, DECODE_SHAPE, effort=Effort(rounds=3, few_calls=few_calls))
    assert timings == {"parallax_gen": 3, "quick one": 3, "slow one": times}
    assert [row.time_us for row in rows] == [100.0, 250.0, 350.0]
    assert rows[2].note == ("slow: few calls timed" if few_calls else "")
    assert limits[0] == float("inf")
    assert limits[1] == (300.0 if few_calls else float("inf"))


def test_medians_and_percentiles_are_medians_over_rounds(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    fake_baselines(monkeypatch, "parallax_gen")
    takes = iter([(10.0, 9.0, 13.0), (30.0, 20.0, 40.0), (11.0, 8.0, 12.0)])
    monkeypatch.setattr(comparing, "time_call", lambda *_, **__: Timing(*next(takes), 20, 7))
    (row,) = compare("decode", DECODE, DECODE_SHAPE)
    assert (row.time_us, row.p20_us, row.p80_us) == (11.0, 9.0, 13.0)


def test_out_of_memory_skips_the_shape_for_ours_and_is_a_note_for_others(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    def too_large(*_: object, **__: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    ours = BASELINES[OURS]
    pair = [ours, Baseline("peer", decode=too_large)]
    monkeypatch.setattr(comparing, "baselines_of", lambda op: pair)
    rows = compare("decode", DECODE, DECODE_SHAPE)
    assert [(row.time_us, row.note) for row in rows] == [(100.0, ""), (None, "out of memory")]
    pair[0] = Baseline("parallax_gen", decode=too_large)
    assert {row.note for row in compare("decode", DECODE, DECODE_SHAPE)} == {"skipped: out of memory"}
    pair[:] = [ours]
    monkeypatch.setattr(comparing, "time_call", too_large)  # a graph has its own memory pool
    (row,) = compare("decode", DECODE, DECODE_SHAPE)
    assert (row.time_us, row.note) == (None, "out of memory")


def test_a_baseline_that_breaks_the_device_is_named(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(comparing, "baselines_of", lambda op: [Baseline("fla", decode=fail)])
    (row,) = compare("decode", DECODE, DECODE_SHAPE)
    assert row.note == "RuntimeError: an illegal memory access was encountered"
    for nothing_runs in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, nothing_runs, fail)
    with pytest.raises(MeasureError, match=r"fla left the device unusable .*illegal.*: run again with --skip 'fla'"):
        compare("decode", DECODE, DECODE_SHAPE)


@pytest.mark.parametrize("kind", [ValueError, NotImplementedError])
def test_failure_notes_are_one_short_line(kind: type[Exception]) -> None:
    message = comparing._failure_note(kind("so long " * 100 + "\nand more"))
    assert len(message) == comparing.MAX_NOTE_LENGTH
    assert "\n" not in message


def test_rows_count_checked_sequences_and_heads(clock: Clock) -> None:
    spec, shape = KernelSpec("decode", 64, "bf16"), Shape(5, 4, 4, 1, 30)
    for extent, checked in (("whole", 20), ("sample", 4), ("none", 0)):
        (row,) = compare("decode", spec, shape, ("parallax_gen",), Effort(oracle=extent))
        assert row.checked == checked
        assert (row.error is None) is (extent == "none")


def test_cached_inputs_of_a_baseline_are_released(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """parallax-kernel's CuTeDSL decode caches its input tensors: after a few large shapes memory would run out."""
    kept: dict[int, Tensor] = {}
    fake_parallax_kernel = ModuleType("parallax.cute")
    fake_parallax_kernel.parallax_decode = ModuleType("parallax.cute.parallax_decode")  # type: ignore[attr-defined]
    fake_parallax_kernel.parallax_decode._cute_input_cache = kept  # type: ignore[attr-defined]
    most: list[int] = []

    def attend(q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, seqused_k: Tensor | None, out: Tensor) -> Tensor:
        kept.update({id(x): x for x in (q, r, k, v)})
        most.append(len(kept))
        return out.copy_(reference_forward(q, r, k, v).out)

    fake_parallax_kernel.parallax_attn_with_kvcache = attend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "parallax.cute", fake_parallax_kernel)
    monkeypatch.setitem(sys.modules, "parallax.cute.parallax_decode", fake_parallax_kernel.parallax_decode)
    compare("decode", KernelSpec("decode", 64, "bf16"), Shape(2, 2, 2, 1, 40), ("parallax-kernel CuTeDSL",))
    assert set(most) == {4}
    assert not kept
