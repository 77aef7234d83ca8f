"""The kernels that `parallax-gen export` writes, and where their configs come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parallax_gen.codegen.exported import read_sections, section, write_sections
from parallax_gen.codegen.render import KernelSource, render
from parallax_gen.describe import describe, time_and_rate
from parallax_gen.errors import ParallaxGenError
from parallax_gen.memory.descriptions import Origins, differences_from_here, shape_of
from parallax_gen.memory.guard import CheckedChoice, checked_choice
from parallax_gen.memory.lock import Lock
from parallax_gen.memory.place import Place, config_at, place_of
from parallax_gen.memory.shipped import Memory
from parallax_gen.ops.base import KernelConfig, config_to_dict, op_of
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape, representative
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.steps import Call
from parallax_gen.runtime.export_for_c import write_for_c

# A call of this package first compiles a borrowed kernel and may reject it. An exported file has no such check.
NOT_CHECKED = "not checked here: the file launches it even if it spills far more than the default"

BY_POINTERS = "loads by pointers in place of tensor descriptors, which a C program would have to make"


@dataclass(frozen=True)
class ExportedKernel:
    """A kernel to export: its place and config, and a sentence that says where the config comes from.

    spec  differs from its place's if it is batch-invariant: see `memory.place.place_of`
    """

    spec: KernelSpec
    place: Place
    config: KernelConfig
    provenance: str

    def by_pointers(self) -> ExportedKernel:
        """The kernel of the same config that loads by pointers, if this one loads by tensor descriptors."""
        if getattr(self.config, "LOADS", "") != "descriptors":
            return self
        config: Any = replace(self.config, LOADS="pointers")
        return replace(self, config=config, provenance=f"{self.provenance}; {BY_POINTERS}")

    def file_name(self, source: KernelSource) -> str:
        """An importable module name, such as decode_d128_bf16_g4_rows256_kv8192.py."""
        bucket = self.place.bucket
        lengths = op_of(self.spec).bucket_suffix(self.spec, bucket)
        window = f"_w{bucket.window}" if bucket.window else ""
        return f"{source.name}_rows{bucket.kv_rows}{lengths}{window}.py"


@dataclass(frozen=True)
class WrittenKernel:
    """An exported kernel and its files. for_c: the header, the launch parameters, a program, and the cubins, or none"""

    path: Path
    kernel: ExportedKernel
    for_c: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        kernel = self.kernel
        return {
            "file": str(self.path),
            "spec": kernel.spec.to_dict(),
            "bucket": kernel.place.bucket.to_dict(),
            "config": config_to_dict(kernel.config),
            "from": kernel.provenance,
            **({"for_c": [str(path) for path in self.for_c]} if self.for_c else {}),
        }

    @property
    def lines(self) -> list[str]:
        """What the files are, in sentences."""
        c_files = [f"for C: {', '.join(path.name for path in self.for_c)}"] if self.for_c else []
        return [describe(self.kernel.config), self.kernel.provenance, *c_files]


def kernels_at(
    kernels: Iterable[tuple[KernelSpec, Place]], gpu: Gpu, memory: Memory, lock: Lock | None = None
) -> list[ExportedKernel]:
    """What calls of each kernel get at its place, each once. Raises LockError if the lock refuses one."""
    choices = {(spec, place): checked_choice(place, gpu, memory, lock=lock) for spec, place in kernels}
    origins = Origins(memory)
    return [_exported(spec, place, choice, origins) for (spec, place), choice in choices.items()]


def known_places(memory: Memory, gpu: Gpu, matches: Callable[[Place], bool]) -> list[Place]:
    """The places with a measured record that calls use."""
    places = dict.fromkeys(r.place for r in memory.all(gpu.name) if r.measured and matches(r.place))
    return [place for place in places if checked_choice(place, gpu, memory).candidate.record]


def write_kernels(
    kernels: Iterable[ExportedKernel], gpu: Gpu, folder: Path, calls: Iterable[Call] | None = None
) -> list[WrittenKernel]:
    """Write each kernel to a file, and the folder's README.md. Raises ParallaxGenError if the folder is not usable.

    calls  also compile each kernel, and write its cubins and what a C program needs to launch them: for the sizes of
           the first of these calls in its bucket, else for the sizes that the bucket is tuned at. Not for AMD GPUs
    """
    if calls is not None and gpu.is_amd:
        raise ParallaxGenError(f"{gpu.title} runs no cubins: without them, the exported files run through Triton")
    readme = folder / "README.md"
    sections = read_sections(readme)
    written: list[WrittenKernel] = []
    shapes = None if calls is None else _shapes_of(calls, gpu)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kernel in kernels:
            place = kernel.place
            for_c: tuple[Path, ...] = ()
            if shapes is not None:
                kernel = kernel.by_pointers()
            source = render(kernel.spec, kernel.config, gpu)
            path = folder / kernel.file_name(source)
            path.write_text(source.text, encoding="utf-8")
            if shapes is not None:
                shape = shapes.get((kernel.spec, place)) or representative(place.bucket, kernel.spec.group)
                for_c = write_for_c(path, source, kernel.spec, kernel.config, shape, gpu)
            about = f"{kernel.spec}; {place.bucket}"
            names = [file.name for file in for_c]
            sections[path.name] = section(source.text, about, gpu.title, kernel.provenance, names)
            written.append(WrittenKernel(path, kernel, for_c))
        write_sections(readme, sections)
    except OSError as error:
        raise ParallaxGenError(f"cannot write to {folder}: {error}") from error
    return written


def _shapes_of(calls: Iterable[Call], gpu: Gpu) -> dict[tuple[KernelSpec, Place], Shape]:
    """The sizes to compile each kernel for. Raises ParallaxGenError for calls of one bucket with different heads."""
    shapes: dict[tuple[KernelSpec, Place], Shape] = {}
    for call in calls:
        first = shapes.setdefault((call.spec, place_of(gpu.name, call.spec, call.shape)), call.shape)
        if first.kv_heads != call.shape.kv_heads:  # strides of the heads may be compiled in
            raise ParallaxGenError(f"{first} and {call.shape} would be one file: export them to two folders")
    return shapes


def _exported(spec: KernelSpec, place: Place, choice: CheckedChoice, origins: Origins) -> ExportedKernel:
    config, record = config_at(spec, choice.candidate.config), choice.candidate.record
    if choice.candidate.locked:
        return ExportedKernel(spec, place, config, "the lock that was on, which decides without records")
    if record is None:
        reason = ", not measured: no record can be used"
        if choice.refused:
            reason = ": every borrowed kernel spills too much, does not fit or does not compile here"
        return ExportedKernel(spec, place, config, f"the default config{reason}")
    assert record.time_us is not None
    owner = {"yours": "your record", "shipped": "a shipped record"}[origins.of(record)]
    if record.place != place:
        owner += f", measured on {record.place.gpu}"
        owner += f" at {record.place.bucket}" if record.place.bucket != place.bucket else ""
    if choice.candidate.supports_default:
        owner = f"the default config, by {owner}"
    timed = f"{time_and_rate(place.spec, shape_of(record), record.time_us)} at {shape_of(record)}"
    parts = [owner, record.source, record.created_at, timed]
    if differences := differences_from_here(record):
        parts.append(", ".join(differences))
    if not choice.checked:
        parts.append(NOT_CHECKED)
    return ExportedKernel(spec, place, config, "; ".join(part for part in parts if part))
