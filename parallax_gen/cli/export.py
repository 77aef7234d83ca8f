"""`parallax-gen export`: writes each kernel to a file, for use without this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parallax_gen.cli.options import (
    KernelArgs,
    gpu_option,
    gpu_or_stand_in,
    json_option,
    kernel_options,
    shape_option,
)
from parallax_gen.cli.text import print_json
from parallax_gen.codegen import device
from parallax_gen.codegen.exported import read_sections, section, write_sections
from parallax_gen.describe import describe, time_and_rate
from parallax_gen.errors import ParallaxGenError
from parallax_gen.ops.base import KernelConfig, config_to_dict, op_of
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import Sizes

if TYPE_CHECKING:
    from parallax_gen.codegen.render import KernelSource
    from parallax_gen.memory.descriptions import Origins
    from parallax_gen.memory.guard import CheckedChoice
    from parallax_gen.memory.place import Place
    from parallax_gen.memory.shipped import Memory

# A call of this package first compiles a borrowed kernel and may reject it. An exported file has no such check.
NOT_CHECKED = "not checked here: the file launches it even if it spills far more than the default"


@dataclass(frozen=True)
class ExportedKernel:
    """A kernel to export: its config, and a sentence that says where the config comes from."""

    spec: KernelSpec
    bucket: Bucket
    config: KernelConfig
    provenance: str

    def file_name(self, source: KernelSource) -> str:
        """An importable module name, such as decode_d128_bf16_g4_rows256_kv8192.py."""
        bucket = self.bucket
        lengths = op_of(self.spec).bucket_suffix(self.spec, bucket)
        window = f"_w{bucket.window}" if bucket.window else ""
        return f"{source.name}_rows{bucket.kv_rows}{lengths}{window}.py"


@click.command()
@gpu_option
@kernel_options
@shape_option(multiple=True, more_help="Repeatable. Default: every bucket with a measured record.")
@click.option("-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), required=True)
@json_option
def export(gpu: str | None, requested: KernelArgs, shapes: tuple[Sizes, ...], folder: Path, as_json: bool) -> None:
    """Write the best kernels as files that need only torch and triton.

    Writes one file for each --shape, or for each group and bucket of sizes with a measured record of the kernel, and a
    README.md that says how to call them. They are the kernels that calls get: see parallax-gen explain. If no record
    can be used, the file has the default config.

    \b
    Example
      parallax-gen export --gpu h200 --op decode -o kernels
    """
    from parallax_gen.codegen.render import render
    from parallax_gen.memory.descriptions import open_memory

    card = gpu_or_stand_in(gpu, lambda: device.gpu_here(0))
    chosen = chosen_kernels(requested, shapes, card, open_memory())
    readme = folder / "README.md"
    sections = read_sections(readme)
    written: list[tuple[Path, ExportedKernel]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kernel in chosen:
            source = render(kernel.spec, kernel.config, card)
            path = folder / kernel.file_name(source)
            path.write_text(source.text, encoding="utf-8")
            sections[path.name] = section(source.text, f"{kernel.spec}; {kernel.bucket}", card.title, kernel.provenance)
            written.append((path, kernel))
        write_sections(readme, sections)
    except OSError as error:
        raise ParallaxGenError(f"cannot write to {folder}: {error}") from error
    if as_json:
        print_json({"gpu": card.name, "readme": str(readme), "kernels": [_to_json(*file) for file in written]})
        return
    for path, kernel in written:
        click.echo(f"{path}\n    {describe(kernel.config)}\n    {kernel.provenance}")


def _to_json(path: Path, kernel: ExportedKernel) -> dict[str, Any]:
    return {
        "file": str(path),
        "spec": kernel.spec.to_dict(),
        "bucket": kernel.bucket.to_dict(),
        "config": config_to_dict(kernel.config),
        "from": kernel.provenance,
    }


def chosen_kernels(requested: KernelArgs, shapes: Sequence[Sizes], gpu: Gpu, memory: Memory) -> list[ExportedKernel]:
    """One kernel per shape; without shapes one per bucket with a measured record, or the op's first usual shape."""
    from parallax_gen.memory.descriptions import Origins
    from parallax_gen.memory.guard import checked_choice
    from parallax_gen.memory.place import Place
    from parallax_gen.problem.shapes import bucket_of

    origins = Origins(memory)
    kernels = [requested.kernel(sizes) for sizes in shapes]
    places = [Place(gpu.name, spec, bucket_of(shape)) for spec, shape in kernels]
    if not shapes:
        places = [r.place for r in memory.all(gpu.name, requested.op) if r.measured and requested.matches(r.place)]
    choices = {place: checked_choice(place, gpu, memory) for place in places}
    if not shapes:
        choices = {place: choice for place, choice in choices.items() if choice.candidate.record}
    if not choices:
        spec, shape = requested.kernel(None)
        place = Place(gpu.name, spec, bucket_of(shape))
        choices = {place: checked_choice(place, gpu, memory)}
    return [_exported_kernel(place, choice, origins) for place, choice in choices.items()]


def _exported_kernel(place: Place, choice: CheckedChoice, origins: Origins) -> ExportedKernel:
    from parallax_gen.memory.descriptions import differences_from_here, shape_of

    config, record = choice.candidate.config, choice.candidate.record
    if record is None:
        reason = ", not measured: no record can be used"
        if choice.refused:
            reason = ": every borrowed kernel spills too much, does not fit or does not compile here"
        return ExportedKernel(place.spec, place.bucket, config, f"the default config{reason}")
    assert record.time_us is not None
    owner = {"yours": "your record", "shipped": "a shipped record"}[origins.of(record)]
    if record.place != place:
        owner += f", measured on {record.place.gpu}"
        owner += f" at {record.place.bucket}" if record.place.bucket != place.bucket else ""
    timed = f"{time_and_rate(place.spec, shape_of(record), record.time_us)} at {shape_of(record)}"
    parts = [owner, record.source, record.created_at, timed]
    if differences := differences_from_here(record):
        parts.append(", ".join(differences))
    if not choice.checked:
        parts.append(NOT_CHECKED)
    return ExportedKernel(place.spec, place.bucket, config, "; ".join(part for part in parts if part))
