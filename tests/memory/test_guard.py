"""The guard: a borrowed kernel is used only if it compiles without many spills here; the outcome is cached."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import triton

from parallax_gen.codegen.render import KernelSource, render
from parallax_gen.codegen.resources import Resources
from parallax_gen.errors import BuildError
from parallax_gen.memory import guard
from parallax_gen.memory.guard import MAX_EXTRA_SPILLS, cache_resources, cached_resources, checked_choice
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, Tier, default_of, evidence_of
from parallax_gen.memory.result import Result
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.space import every_config
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket, Shape, representative
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime import dispatch

GPU = GPUS["h200"]
SPEC = KernelSpec("forward", 64, "bf16", causal=True)
PLACE = Place(GPU.name, SPEC, Bucket(8, 4096, 4096))
DEFAULT = default_of(PLACE, GPU)
# Records whose search did not try a knob's value of the default are not borrowed, so these have its LOADS.
FIRST, SECOND, THIRD = [c for c in every_config(SPEC, GPU) if c != DEFAULT and c.LOADS == DEFAULT.LOADS][:3]  # type: ignore[attr-defined]
FINE = Resources(200, 0, 1000)
SPILLS = Resources(255, MAX_EXTRA_SPILLS + 8, 1000)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(guard, "cache_dir", lambda: tmp_path)
    return tmp_path


def record(config: KernelConfig, time_us: float, triton: str = "2.0.0") -> Result:
    evidence = dataclasses.replace(evidence_of(render(SPEC, config, GPU)), triton=triton)
    return Result(PLACE, evidence, config, "ok", time_us=time_us)


BORROWED = RecordTable([record(FIRST, 1.0), record(SECOND, 2.0), record(THIRD, 3.0)])


class Compiler:
    """A fake compiler: returns the resources of each config's kernel and records the requests."""

    def __init__(self, **needs: Resources | Exception | None) -> None:
        self.needs, self.requests = needs, []  # type: ignore[var-annotated]

    def __call__(self, config: KernelConfig) -> Resources | None:
        name = {FIRST: "first", SECOND: "second", THIRD: "third", DEFAULT: "default"}[config]
        self.requests.append(name)
        result = self.needs.get(name)
        if isinstance(result, Exception):
            raise result
        return result


@pytest.mark.parametrize("resources", [FINE, Resources(255, MAX_EXTRA_SPILLS, GPU.shared_per_block)])
def test_a_kernel_that_compiles_well_is_used_without_further_compilation(resources: Resources) -> None:
    compiler = Compiler(first=resources)
    result = checked_choice(PLACE, GPU, BORROWED, compiler)
    assert (result.candidate.config, result.checked, result.refused) == (FIRST, True, ())
    assert compiler.requests == ["first"]


def test_a_kernel_that_spills_more_than_the_default_is_rejected() -> None:
    compiler = Compiler(first=SPILLS, second=FINE, default=Resources(255, 7, 1000))
    result = checked_choice(PLACE, GPU, BORROWED, compiler)
    assert (result.candidate.config, result.checked) == (SECOND, True)
    ((refused, why),) = result.refused
    assert refused.config == FIRST
    assert why == "it spills 136 bytes per thread when compiled here, the default 7"
    assert compiler.requests == ["first", "default", "second"]
    # Not if the default spills as much.
    alike = Compiler(first=SPILLS, default=Resources(255, 8, 1000))
    assert checked_choice(PLACE, GPU, BORROWED, alike).candidate.config == FIRST


@pytest.mark.parametrize(
    ("needs", "why"),
    [
        (BuildError("no such instruction"), "it does not compile here: no such instruction"),
        (Resources(100, 0, GPU.shared_per_block + 1), "bytes of shared memory; the card has"),
    ],
)
def test_a_kernel_that_does_not_compile_or_fit_is_rejected(needs: Resources | Exception, why: str) -> None:
    result = checked_choice(PLACE, GPU, BORROWED, Compiler(first=needs, second=FINE))
    assert result.candidate.config == SECOND
    assert why in result.refused[0][1]


def test_at_most_two_borrowed_kernels_are_tried() -> None:
    compiler = Compiler(first=SPILLS, second=SPILLS, third=FINE, default=FINE)
    result = checked_choice(PLACE, GPU, BORROWED, compiler)
    assert (result.candidate.tier, result.candidate.config, result.checked) == (Tier.DEFAULT, DEFAULT, True)
    assert [candidate.config for candidate, _ in result.refused] == [FIRST, SECOND]
    assert "third" not in compiler.requests


def test_a_kernel_with_two_records_is_compiled_and_counted_once() -> None:
    table = RecordTable(
        [record(FIRST, 1.0), record(FIRST, 1.0, "1.9.0"), record(SECOND, 2.0), record(SECOND, 2.0, "1.9.0")]
    )
    table = RecordTable([*table.results(PLACE), record(THIRD, 3.0), record(THIRD, 3.0, "1.9.0")])
    result = checked_choice(PLACE, GPU, table, Compiler(first=SPILLS, second=FINE, default=FINE))
    assert result.candidate.config == SECOND
    assert len(result.refused) == 1


def test_the_borrowed_kernel_is_used_if_the_default_does_not_compile() -> None:
    result = checked_choice(PLACE, GPU, BORROWED, Compiler(first=SPILLS, default=BuildError("no")))
    assert result.candidate.config == FIRST


def test_kernels_measured_here_are_not_checked() -> None:
    compiler = Compiler()
    here = Toolchain.here().triton
    table = RecordTable([record(config, 9.0, here) for config in (FIRST, SECOND, THIRD)])
    assert checked_choice(PLACE, GPU, table, compiler).checked
    assert checked_choice(PLACE, GPU, RecordTable([]), compiler).candidate.config == DEFAULT
    assert compiler.requests == []


def test_a_borrowed_record_of_the_default_is_not_checked() -> None:
    compiler = Compiler()
    result = checked_choice(PLACE, GPU, RecordTable([record(DEFAULT, 1.0)]), compiler)
    assert (result.candidate.tier, result.candidate.config) == (Tier.OTHER_TOOLCHAIN, DEFAULT)
    assert result.checked
    assert compiler.requests == []


def test_kernels_not_compiled_yet_are_reported_as_unchecked() -> None:
    result = checked_choice(PLACE, GPU, BORROWED)
    assert (result.candidate.config, result.checked) == (FIRST, False)
    cache_resources(render(SPEC, FIRST, GPU), GPU, SPILLS)
    result = checked_choice(PLACE, GPU, BORROWED)
    assert (result.candidate.config, result.checked, result.refused) == (
        FIRST,
        False,
        (),
    )  # the decision depends on the default's spills
    cache_resources(render(SPEC, DEFAULT, GPU), GPU, SPILLS)
    result = checked_choice(PLACE, GPU, BORROWED)
    assert (result.candidate.config, result.checked) == (FIRST, True)
    cache_resources(render(SPEC, DEFAULT, GPU), GPU, FINE)
    assert checked_choice(PLACE, GPU, BORROWED).refused[0][0].config == FIRST


def test_a_failed_compilation_is_cached() -> None:
    """So commands report the kernel that calls launch, and no later process compiles it again."""
    cache_resources(render(SPEC, FIRST, GPU), GPU, BuildError("ptxas: no\nregisters left"))
    result = checked_choice(PLACE, GPU, BORROWED)
    assert [why for _, why in result.refused] == ["it does not compile here: ptxas: no registers left"]
    assert (result.candidate.config, result.checked) == (SECOND, False)
    with pytest.raises(BuildError, match="no registers left"):
        cached_resources(render(SPEC, FIRST, GPU), GPU)


@pytest.mark.parametrize("needs", [Resources(255, 0, GPU.shared_per_block + 1), BuildError("no")])
def test_obvious_rejections_do_not_compile_the_default(needs: Any) -> None:
    compiler = Compiler(first=needs, second=FINE)
    assert checked_choice(PLACE, GPU, BORROWED, compiler).candidate.config == SECOND
    assert compiler.requests == ["first", "second"]


def test_outcomes_are_cached_by_kernel_toolchain_and_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    source = render(SPEC, FIRST, GPU)
    cache_resources(source, GPU, FINE)
    assert cached_resources(source, GPU) == cached_resources(source, GPUS["h100"]) == FINE
    assert cached_resources(render(SPEC, SECOND, GPU), GPU) is None
    assert cached_resources(source, GPUS["b200"]) is None
    monkeypatch.setattr(Toolchain, "here", classmethod(lambda cls: Toolchain("9.9.9", "99.9")))
    assert cached_resources(source, GPU) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"registers": 1}',
        '{"registers": 1, "spills": -1, "shared_bytes": 0}',
        '{"registers": "1", "spills": 0, "shared_bytes": 0}',
        '{"registers": 1, "spills": 0, "shared_bytes": true}',
        '{"registers": 1, "spills": 1e3, "shared_bytes": 0}',
        f'{{"registers": 1, "spills": {2**2000}, "shared_bytes": 0}}',
        '{"registers": 1, "spills": "\\ud800", "shared_bytes": 0}',
    ],
)
def test_a_damaged_cache_entry_is_ignored(cache: Path, text: str) -> None:
    source = render(SPEC, FIRST, GPU)
    cache_resources(source, GPU, FINE)
    (path,) = (cache / f"resources-{guard.FORMAT}").iterdir()
    path.write_text(text, encoding="utf-8")
    assert cached_resources(source, GPU) is None


def test_without_a_cache_folder_kernels_are_checked_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(guard, "cache_dir", lambda: tmp_path / "file")
    source = render(SPEC, FIRST, GPU)
    cache_resources(source, GPU, FINE)
    assert cached_resources(source, GPU) is None


def test_a_call_tries_a_failing_compilation_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call, in any process, and `explain` read the cached outcome."""
    compiled_configs: list[KernelConfig] = []

    def fail(source: KernelSource, spec: KernelSpec, config: KernelConfig, shape: Shape) -> Resources:
        compiled_configs.append(config)
        raise BuildError("no registers left")

    monkeypatch.setattr(dispatch, "compile_here", fail)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    shape = representative(PLACE.bucket, SPEC.group)
    for _ in range(2):
        compiled = dispatch.compiler(SPEC, shape, GPU)
        assert checked_choice(PLACE, GPU, BORROWED, compiled).candidate.config == DEFAULT
    assert compiled_configs == [FIRST, SECOND]
    assert checked_choice(PLACE, GPU, BORROWED).candidate.config == DEFAULT
