"""`parallax-gen export`: kernels as files of their own, for use without this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parallax_gen.cli.options import (
    Asked,
    Sizes,
    gpu_named,
    gpu_option,
    json_option,
    kernel_options,
    shape_option,
)
from parallax_gen.cli.readme import read_sections, section, write_sections
from parallax_gen.cli.text import print_json, time_and_rate
from parallax_gen.errors import ParallaxGenError
from parallax_gen.problem.config import KernelConfig, config_to_dict, describe
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    from parallax_gen.cli.known import Origins
    from parallax_gen.codegen.render import KernelSource
    from parallax_gen.memory.results import Result
    from parallax_gen.memory.shipped import Memory


@dataclass(frozen=True)
class Pick:
    """A kernel to export: its config, and in a sentence where that comes from."""

    spec: KernelSpec
    bucket: Bucket
    config: KernelConfig
    provenance: str

    def file_name(self, source: KernelSource) -> str:
        """Such as decode_d128_bf16_g4_rows256_kv8192.py: a module that can be imported."""
        bucket = self.bucket
        queries = "" if self.spec.op == "decode" and not self.spec.many_queries else f"_q{bucket.seqlen_q}"
        keys = "" if self.spec.op == "preprocess" else f"_kv{bucket.seqlen_kv}"
        window = f"_w{bucket.window}" if bucket.window else ""
        return f"{source.name}_rows{bucket.kv_rows}{queries}{keys}{window}.py"


@click.command()
@gpu_option
@kernel_options
@shape_option(multiple=True, more_help="Repeatable. Default: every one that a record is known for.")
@click.option("-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), required=True)
@json_option
def export(gpu: str | None, asked: Asked, shapes: tuple[Sizes, ...], folder: Path, as_json: bool) -> None:
    """Write the best kernels as files for torch and triton alone.

    One file a known best record of the kernel, of any group and sizes or of each --shape, and a README.md that says
    how to call them. A record of another Triton version counts too, where there is none of this one's: the source is
    for use elsewhere. Where no record is known the config is the default one.

    \b
    Example
      parallax-gen export --gpu h200 --op decode -o kernels
    """
    from parallax_gen.cli.known import open_memory
    from parallax_gen.codegen.render import render

    card = gpu_named(gpu)
    picks = picked(asked, shapes, card, open_memory())
    readme = folder / "README.md"
    sections = read_sections(readme)
    written: list[tuple[Path, Pick]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pick in picks:
            source = render(pick.spec, pick.config, card)
            path = folder / pick.file_name(source)
            path.write_text(source.text, encoding="utf-8")
            sections[path.name] = section(source.text, f"{pick.spec}; {pick.bucket}", card.title, pick.provenance)
            written.append((path, pick))
        write_sections(readme, sections)
    except OSError as error:
        raise ParallaxGenError(f"cannot write to {folder}: {error}") from error
    if as_json:
        print_json({"gpu": card.name, "readme": str(readme), "kernels": [_to_json(*each) for each in written]})
        return
    for path, pick in written:
        click.echo(f"{path}\n    {describe(pick.config)}\n    {pick.provenance}")


def _to_json(path: Path, pick: Pick) -> dict[str, Any]:
    return {
        "file": str(path),
        "spec": pick.spec.to_dict(),
        "bucket": pick.bucket.to_dict(),
        "config": config_to_dict(pick.config),
        "from": pick.provenance,
    }


def picked(asked: Asked, shapes: Sequence[Sizes], gpu: Gpu, memory: Memory) -> list[Pick]:
    """One kernel a shape; of no shapes, one a bucket that is known, else one for the op's first usual shape."""
    from parallax_gen.cli.known import Origins
    from parallax_gen.problem.shapes import bucket_of

    best, origins = _best_records(asked, gpu, memory), Origins(memory, gpu.name)
    if not shapes and best:
        return [_from_record(record, origins) for record in best.values()]
    picks = {}
    for sizes in shapes or (None,):
        spec, shape = asked.kernel(sizes)
        bucket = bucket_of(shape)
        record = best.get((spec, bucket))
        picks[spec, bucket] = _default(spec, bucket, gpu) if record is None else _from_record(record, origins)
    return list(picks.values())


def _best_records(asked: Asked, gpu: Gpu, memory: Memory) -> dict[tuple[KernelSpec, Bucket], Result]:
    """Of each spec and bucket the fastest in this environment, else in the newest other one of the same templates."""
    from parallax_gen.cli.known import unlike_here
    from parallax_gen.memory.results import reading_order
    from parallax_gen.problem.space import why_invalid

    def usable(record: Result) -> bool:
        same_templates = "environment.templates" not in unlike_here(record.key)
        asked_for = record.measured and asked.holds(record.key)
        return asked_for and same_templates and why_invalid(record.key.spec, record.config, gpu) is None

    records = filter(usable, memory.all(gpu.name, asked.op))  # sorted: of each key the fastest comes first
    fastest = [next(group) for _, group in groupby(records, key=lambda r: r.key)]
    fastest.sort(key=lambda r: r.created_at, reverse=True)
    fastest.sort(key=lambda r: bool(unlike_here(r.key)))  # stable: the newest stay first among those of elsewhere
    best: dict[tuple[KernelSpec, Bucket], Result] = {}
    for record in fastest:
        best.setdefault((record.key.spec, record.key.bucket), record)
    return {(r.key.spec, r.key.bucket): r for r in sorted(best.values(), key=reading_order)}


def _from_record(record: Result, origins: Origins) -> Pick:
    from parallax_gen.cli.known import differences, shape_of, unlike_here

    key, shape = record.key, shape_of(record)
    assert record.time_us is not None
    whose = {"yours": "your record", "shipped": "a shipped record"}[origins.of(record)]
    parts = [whose, record.source, record.created_at, f"{time_and_rate(key.spec, shape, record.time_us)} at {shape}"]
    if unlike := differences(unlike_here(key)):
        parts.append(f"in another environment: {', '.join(unlike)}")
    return Pick(key.spec, key.bucket, record.config, "; ".join(part for part in parts if part))


def _default(spec: KernelSpec, bucket: Bucket, gpu: Gpu) -> Pick:
    from parallax_gen.problem.heuristics import default_config
    from parallax_gen.problem.shapes import representative

    config = default_config(spec, representative(bucket, spec.group), gpu)
    return Pick(spec, bucket, config, "the default config: no record is known, so it was not measured")
