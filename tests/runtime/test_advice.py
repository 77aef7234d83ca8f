"""The warning for a kernel that was not measured here, how often it is given, and PARALLAX_GEN_STRICT."""

from __future__ import annotations

import _thread
import logging
import random
import shlex
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import torch.distributed as dist
from strategies import random_spec

from parallax_gen.cli.tune import tune
from parallax_gen.codegen.render import render
from parallax_gen.errors import ArgumentError, UntunedError
from parallax_gen.memory.commands import tune_command
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, default_of, evidence_of
from parallax_gen.memory.result import Result
from parallax_gen.memory.toolchain import Toolchain, UntestedTritonWarning
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket, bucket_of, representative
from parallax_gen.problem.spec import DTYPES, OPS, KernelSpec
from parallax_gen.problem.workloads import Flags, kernels
from parallax_gen.runtime import dispatch
from parallax_gen.runtime.dispatch import Dispatcher, UntunedWarning, user_stacklevel

pytestmark = pytest.mark.interpreter

GPU = GPUS["h200"]
SPEC = KernelSpec("forward", 64, "bf16", causal=True)
PLACE = Place("h200", SPEC, Bucket(8, 1024, 1024))
SHAPE = representative(PLACE.bucket, SPEC.group)
OTHER = replace(PLACE, bucket=Bucket(16, 1024, 1024))


def record(**evidence: str) -> Result:
    config = default_of(PLACE, GPU)
    result = replace(evidence_of(render(SPEC, config, GPU)), **evidence)
    return Result(PLACE, result, config, "ok", time_us=5.0)


def warnings_of_calls(dispatcher: Dispatcher, *places: Place) -> list[str]:
    """The warnings of calls for these places, in order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for place in places:
            dispatcher.kernel(place.spec, representative(place.bucket, place.spec.group), GPU)
    assert all(issubclass(warning.category, UntunedWarning) for warning in caught)
    return [str(warning.message) for warning in caught]


def test_the_warning_is_given_once_with_the_command_that_fixes_it(caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = Dispatcher(RecordTable([]))
    with caplog.at_level(logging.WARNING):
        (message,) = warnings_of_calls(dispatcher, PLACE, PLACE, OTHER)
    assert "its default config is used" in message
    assert f"Run `{tune_command(PLACE)}` to measure it. " in message
    assert [r.getMessage() for r in caplog.records] == [message]
    assert warnings_of_calls(dispatcher, replace(PLACE, bucket=Bucket(32, 1024, 1024))) == []


def test_if_warnings_are_errors_it_is_raised_once() -> None:
    dispatcher = Dispatcher(RecordTable([]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UntunedWarning, match="its default config is used"):
            dispatcher.kernel(SPEC, SHAPE, GPU)
        dispatcher.kernel(SPEC, SHAPE, GPU)
    assert warnings_of_calls(dispatcher, OTHER) == []


# Modules of frames between the user's line and the dispatcher: this package, torch, and code that torch generates.
INNER_MODULES = ["parallax_gen.runtime.attention", "torch._library.custom_ops", "torch", None]


def call_through(modules: Sequence[str | None], call: Callable[[], object]) -> Callable[[], object]:
    """A call through one frame per module, the last one the innermost."""
    for name in reversed(modules):
        module: dict[str, Any] = {"call": call} | ({} if name is None else {"__name__": name})
        exec("def through():\n    return call()", module)
        call = module["through"]
    return call


@pytest.mark.parametrize("modules", [[], *([name] for name in INNER_MODULES), INNER_MODULES])
def test_the_warning_points_to_the_users_line(modules: list[str | None]) -> None:
    call = call_through(modules, partial(Dispatcher(RecordTable([])).kernel, SPEC, SHAPE, GPU))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()  # here
    (warning,) = caught
    assert Path(warning.filename) == Path(__file__)
    assert Path(__file__).read_text(encoding="utf-8").splitlines()[warning.lineno - 1].endswith("call()  # here")


def test_without_a_users_line_it_points_to_the_outermost_frame() -> None:
    """For example on autograd's threads."""
    levels: list[int] = []
    finished = threading.Event()
    level = call_through(["torch.autograd", "parallax_gen.runtime.autograd"], user_stacklevel)
    source = "def outermost():\n    levels.append(level())\n    told.set()"
    module: dict[str, Any] = {"__name__": "torch.autograd", "level": level, "levels": levels, "told": finished}
    exec(source, module)
    _thread.start_new_thread(module["outermost"], ())
    assert finished.wait(10.0)
    assert levels == [3]


def test_no_warning_for_kernels_measured_here() -> None:
    assert warnings_of_calls(Dispatcher(RecordTable([record()])), PLACE) == []


def test_the_warning_names_the_other_toolchain_or_card() -> None:
    (message,) = warnings_of_calls(Dispatcher(RecordTable([record(triton="3.1.0", cuda="12.4")])), PLACE)
    assert "a record of h200 with Triton 3.1, ptxas 12.4 is used" in message
    of_protocol = replace(record(), evidence=replace(record().evidence, protocol=0))
    (message,) = warnings_of_calls(Dispatcher(RecordTable([of_protocol])), PLACE)
    assert f"a record of h200 with {Toolchain.here()} by timing protocol 0 (today's is 1) is used" in message
    on_sibling = replace(record(), place=replace(PLACE, gpu="h100"))
    (message,) = warnings_of_calls(Dispatcher(RecordTable([on_sibling])), PLACE)
    assert "a record of h100 with " in message
    decode = Place("h200", KernelSpec("decode", 64, "bf16"), Bucket(8, 1, 1024))
    near = replace(decode, bucket=Bucket(8, 1, 2048))
    default: Any = default_of(decode, GPU)
    configs = [replace(default, num_stages=stages) for stages in (default.num_stages, 2, 5)]
    of_near = [Result(near, evidence_of(render(near.spec, c, GPU)), c, "ok", time_us=5.0) for c in configs]
    (message,) = warnings_of_calls(Dispatcher(RecordTable(of_near)), decode)
    assert "its default config is used, which was at most 3% slower than the fastest config at " in message
    assert " at batch x kv_heads 8, seqlen 1x2048 on h200 with " in message


ON, OFF = ("1", "true", "True", "YES", "on"), ("0", "false", "No", "OFF", "")


@pytest.mark.parametrize("value", ON)
def test_the_warning_can_be_silenced(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PARALLAX_GEN_QUIET", value)
    assert warnings_of_calls(Dispatcher(RecordTable([])), PLACE) == []


@pytest.mark.parametrize("value", OFF)
def test_switches_that_are_off_have_no_effect(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PARALLAX_GEN_QUIET", value)
    monkeypatch.setenv("PARALLAX_GEN_STRICT", value)
    assert len(warnings_of_calls(Dispatcher(RecordTable([])), PLACE)) == 1


@pytest.mark.parametrize("variable", ["PARALLAX_GEN_QUIET", "PARALLAX_GEN_STRICT"])
@pytest.mark.parametrize("known", [[], [0]])
def test_an_invalid_switch_is_an_error(monkeypatch: pytest.MonkeyPatch, variable: str, known: list[int]) -> None:
    """At the first call, also for a kernel that was measured here."""
    monkeypatch.setenv(variable, "maybe")
    dispatcher = Dispatcher(RecordTable([record() for _ in known]))
    message = f"{variable}: got 'maybe'; allowed: 1, true, yes, on for on; 0, false, no, off for off"
    for _ in range(2):
        with pytest.raises(ArgumentError, match=f"^{message}$"):
            warnings_of_calls(dispatcher, PLACE)


def test_only_rank_0_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert warnings_of_calls(Dispatcher(RecordTable([])), PLACE) == []
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    assert len(warnings_of_calls(Dispatcher(RecordTable([])), PLACE)) == 1


def test_a_triton_newer_than_was_tested_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "newer_than_tested", lambda: "Triton 3.10.0 is newer than 3.9.")
    dispatcher = Dispatcher(RecordTable([record()]))
    with pytest.warns(UntestedTritonWarning, match=r"is newer than 3\.9\. .* once per process"):
        dispatcher.kernel(SPEC, SHAPE, GPU)
    assert all("is newer" not in message for message in warnings_of_calls(dispatcher, OTHER))
    monkeypatch.setenv("PARALLAX_GEN_QUIET", "1")
    assert warnings_of_calls(Dispatcher(RecordTable([record()])), PLACE) == []


@pytest.mark.parametrize("value", ON)
def test_strict_allows_only_kernels_measured_here(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PARALLAX_GEN_STRICT", value)
    assert warnings_of_calls(Dispatcher(RecordTable([record()])), PLACE) == []
    for known in ([], [record(triton="3.1.0")], [replace(record(), place=replace(PLACE, gpu="h100"))]):
        dispatcher = Dispatcher(RecordTable(known))
        for _ in range(2):  # a refused call is refused again
            with pytest.raises(
                UntunedError,
                match=r"^PARALLAX_GEN_STRICT is on, and there is no .*Run `parallax-gen tune .*` to measure it\.$",
            ):
                warnings_of_calls(dispatcher, PLACE)


def test_strict_refuses_before_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "choose", lambda *_: pytest.fail("it chose, which may compile for seconds"))
    monkeypatch.setenv("PARALLAX_GEN_STRICT", "1")
    with pytest.raises(UntunedError) as refused:
        warnings_of_calls(Dispatcher(RecordTable([record(triton="3.1.0")])), PLACE)
    assert " is used" not in str(refused.value)


def test_the_suggested_command_tunes_the_place() -> None:
    """The command line's parser reads the suggested command as the kernel that was called."""
    draw = random.Random(3)
    for _ in range(300):
        spec = random_spec(draw, draw.choice(OPS), DTYPES)
        sizes = [2 ** draw.randint(0, 6), 2 ** draw.randint(7, 14), 2 ** draw.randint(7, 14)]
        if spec.op == "preprocess":
            sizes[2] = sizes[1]
            spec = replace(spec, group=1)
        if spec.public_op == "decode" and not spec.multi_token:
            sizes[1] = 1
        window = min(sizes[2], 2 ** draw.randint(7, 14)) if spec.window else 0
        place = Place("h200", spec, Bucket(*sizes, window))
        arguments = shlex.split(tune_command(place))
        assert arguments[:2] == ["parallax-gen", "tune"]
        with click.Context(tune) as context:
            tune.parse_args(context, arguments[2:])
            options = context.params
        names = ("causal", "stats", "per_sequence_lengths", "window", "varlen", "leftpad", "softcap", "batch_invariant")
        cache = {"page_size": options["page_size"] or 0, "cache_dtype": options["cache_dtype"] or ""}
        flags = Flags(**{name: options[name] for name in names}, **cache)
        (shape,) = options["shapes"]
        result = kernels(
            *options["ops"], *options["head_dims"], *options["dtypes"], shape.for_op(spec.public_op), flags
        )
        assert [(s, bucket_of(sizes)) for s, sizes in result] == [(spec, place.bucket)], arguments
