"""The options that name a model and what it runs, and the plan for it."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parallax_gen.cli.options import Command, KernelArgs, kernel_options, print_bucket, with_options
from parallax_gen.cli.text import print_tables, print_text
from parallax_gen.describe import duration, format_counts
from parallax_gen.memory.place import Place, place_of
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.models import Model
from parallax_gen.problem.shapes import lengths_near
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.steps import SERVING, Call, Serving, Step, Training, steps_of, title_of
from parallax_gen.problem.workloads import NO_FLAGS, TRAINING, USUAL_HEAD_DIM, Flags, Sizes

if TYPE_CHECKING:
    from parallax_gen.tuning.plan import Plan

ASK_ABOVE_S = 600.0


@dataclass(frozen=True)
class ModelArgs:
    """A model's folder, or the heads of its layers, and what it runs with which sizes."""

    path: Path | None
    heads: tuple[int, int] | None
    tp: int
    runs: dict[str, dict[str, int]]

    def steps(self, head_dims: Sequence[int], dtypes: Sequence[str], flags: Flags) -> tuple[Model, list[Step]]:
        """The model, split over the ranks, and its steps. Raises UsageError for options that do not fit together."""
        from parallax_gen.tuning.plan import read_model

        if len(dtypes) > 1 or len(head_dims) > (self.path is None):
            raise click.UsageError("with --model or --for give one --dtype, and one --head-dim only without --model")
        others = replace(flags, page_size=0, cache_dtype="", batch_invariant=False)
        if self.heads is not None:
            others = replace(others, window=None, softcap=False)
            head_dim, windows = head_dims[0] if head_dims else USUAL_HEAD_DIM, ((flags.window or 0, 1),)
            model = Model("one layer", *self.heads, head_dim, windows, flags.softcap)
        else:
            assert self.path is not None
            model = read_model(self.path)
        cache: dict[str, Any] = {"page_size": flags.page_size, "cache_dtype": flags.cache_dtype}
        if others != NO_FLAGS or (SERVING not in self.runs and any(cache.values())):
            allowed = "--batch-invariant; --page-size and --cache-dtype, which need serving; without --model also "
            allowed += "--window and --softcap"
            raise click.UsageError(f"--model and --for allow only these flags of kernels: {allowed}")
        dtype = dtypes[0] if dtypes else model.dtype
        model = replace(model.split(self.tp, "--tp"), dtype=dtype, batch_invariant=flags.batch_invariant)
        training = Training.for_model(model, **self.runs[TRAINING]) if TRAINING in self.runs else None
        serving = Serving.for_model(model, **self.runs[SERVING], **cache) if SERVING in self.runs else None
        if seqlen := self.runs.get(TRAINING, {}).get("seqlen"):
            _print_length("--seqlen", seqlen, "tokens")
        if max_len := self.runs.get(SERVING, {}).get("max_len"):
            _print_length("--max-len", max_len, "keys", flags.page_size or 1)
        return model, steps_of(model, training, serving)


def _print_length(option: str, length: int, unit: str, page_size: int = 1) -> None:
    """Say on standard error which bucket a length means, as `print_bucket` does for a --shape."""
    bucket, lengths = lengths_near(-(-length // page_size) * page_size)  # a cache has whole pages
    if bucket != length:
        print_text(f"{option} {length} means the bucket of {bucket} {unit}, one config for {lengths} {unit}", err=True)


def parse_heads(text: str) -> tuple[int, int]:
    """Parse heads such as 32/8 or 16. Raises BadParameter."""
    match = re.fullmatch(r"([1-9]\d*)(?:/([1-9]\d*))?", text)
    heads, kv_heads = (int(match[1]), int(match[2] or match[1])) if match else (1, 2)
    if heads % kv_heads:
        raise click.BadParameter(f"{text!r} is not query heads/kv heads, such as 32/8, or 16 for as many kv heads")
    return heads, kv_heads


SIZES = {TRAINING: ("batch", "seqlen"), SERVING: ("max_len", "max_batch", "chunk")}
_SIZE: dict[str, Any] = {"type": click.IntRange(min=1), "metavar": "N"}


def model_options(command: Command) -> Command:
    """Add the options that name a model and its runs; the command gets `model`: a ModelArgs, or None without them."""

    @functools.wraps(command)
    def collect(**options: Any) -> Any:
        path, heads, tp = (options.pop(name) for name in ("model", "heads", "tp"))
        flagged = [run for run in SIZES if options.pop(run)]
        runs = [*options.pop("runs"), *flagged]
        given = {run: {name: options.pop(name) for name in names} for run, names in SIZES.items()}
        sizes = {run: {name: size for name, size in values.items() if size} for run, values in given.items()}
        if path is None and not heads and not runs:
            if tp or any(sizes.values()):
                raise click.UsageError("--tp, --batch, --seqlen, --max-len, --max-batch, --chunk need --model or --for")
            return command(model=None, **options)
        if (path is None) != (heads is not None) or (path is None and not runs):
            raise click.UsageError("give either --model, or --for with --heads")
        runs = runs or list(SIZES)
        for run, values in sizes.items():
            if values and run not in runs:
                raise click.UsageError(f"--{next(iter(values)).replace('_', '-')} needs {run}")
        chosen = {run: values for run, values in sizes.items() if run in runs}
        return command(model=ModelArgs(path, heads, tp or 1, chosen), **options)

    options = (
        click.option(
            "--model",
            type=click.Path(path_type=Path),
            metavar="PATH",
            help="A folder of transformers, or its config.json: the kernels that this model calls.",
        ),
        click.option("--tp", **_SIZE, help="Tensor parallel ranks: each has 1/N of the heads."),
        click.option(
            "--for",
            "runs",
            type=click.Choice(tuple(SIZES)),
            multiple=True,
            help="Repeatable. Without --model, the kernels of a layer with --heads and --head-dim.",
        ),
        click.option(
            "--heads", type=parse_heads, metavar="H/KV", help="With --for: 32/8 are 32 heads over 8 kv heads."
        ),
        click.option("--training", is_flag=True, help="With --model, only training. Default: training and serving."),
        click.option("--serving", is_flag=True, help="With --model, only serving."),
        click.option("--batch", **_SIZE, help="Sequences of a training step on one card. Default: 4."),
        click.option(
            "--seqlen", **_SIZE, help="Tokens of each sequence. Default: 4096, or the model's maximum if that is less."
        ),
        click.option(
            "--max-len",
            **_SIZE,
            help="Keys of a served sequence. Default: 8192, or the model's maximum if that is less.",
        ),
        click.option("--max-batch", **_SIZE, help="Sequences that are served together. Default: 8."),
        click.option("--chunk", **_SIZE, help="Tokens of a prompt that one step computes. Default: 2048."),
    )
    return with_options(collect, options)  # type: ignore[return-value]


@dataclass(frozen=True)
class Asked:
    """The kernels that a command is asked about.

    one  whether it is a single kernel, by --op and --shape
    """

    title: str
    steps: list[Step]
    one: bool

    @property
    def calls(self) -> list[Call]:
        """Each kernel at each shape once."""
        return [*{(call.spec, call.shape): call for step in self.steps for call in step.calls}.values()]

    def places(self, gpu: Gpu) -> list[Place]:
        """The places of the calls, each once."""
        return [*dict.fromkeys(place for _, place in self.kernels(gpu))]

    def kernels(self, gpu: Gpu) -> list[tuple[KernelSpec, Place]]:
        """The kernels of the calls and their places, each once."""
        return [*dict.fromkeys((call.spec, place_of(gpu.name, call.spec, call.shape)) for call in self.calls)]


def asked_options(command: Command, *, default: str = "") -> Command:
    """Add the options of `asked`; the command gets `model` and `requested`. default: as in kernel_options"""
    return model_options(kernel_options(command, default=default))


def asked(model: ModelArgs | None, requested: KernelArgs, shapes: Sequence[Sizes], *, usual: bool = False) -> Asked:
    """What --op with --shape, or --model, asks for. Raises UsageError if neither or both are given.

    usual  without a shape, the first of the op's usual shapes
    """
    if model is not None:
        if requested.op or shapes:
            raise click.UsageError("--model and --for choose kernels and sizes: leave out --op and --shape")
        head_dims = [requested.head_dim] if requested.head_dim else []
        dtypes = [requested.dtype] if requested.dtype else []
        split, steps = model.steps(head_dims, dtypes, requested.flags)
        return Asked(str(split), steps, one=False)
    if not requested.op or not (shapes or usual):
        and_shape = "" if usual else " and --shape"
        raise click.UsageError(f"give --op{and_shape}, or --model, or --for with --heads")
    for sizes in shapes:
        print_bucket(sizes, (requested.op,))
    steps = [requested.step(sizes) for sizes in shapes] or [requested.step(None)]
    kernel = title_of(steps[0].calls[-1].spec, requested.op)
    return Asked(kernel, steps, one=len(steps) == len(steps[0].calls) == 1)


def print_plan(plan: Plan, seconds: float, devices: int) -> None:
    """Print the kernels of a plan, what is known of each, and how long the tune takes, on standard error."""
    from parallax_gen.tuning.summary import plan_table

    print_text(f"{plan.model}; on {plan.gpu.name}", err=True)
    print_tables([plan_table(plan)], err=True)
    jobs = f"{len(plan.jobs)} job{'s' * (len(plan.jobs) > 1)} on {devices} device{'s' * (devices > 1)}"
    print_text(f"configs now: {format_counts(plan.tiers)}", err=True)
    print_text(f"{jobs}: {duration(seconds)} at most; Ctrl-C loses no trial", err=True)


def confirm(seconds: float, yes: bool) -> None:
    """Ask before a tune that may take longer than ASK_ABOVE_S. Raises Abort for no, UsageError if nobody can answer."""
    if yes or seconds <= ASK_ABOVE_S:
        return
    if not is_interactive():
        raise click.UsageError(f"this may take more than {ASK_ABOVE_S / 60:.0f} min: --yes begins without asking")
    click.confirm("Begin?", default=True, abort=True, err=True)


def is_interactive() -> bool:
    return sys.stdin.isatty()
