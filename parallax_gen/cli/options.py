"""The options that several commands share, and their parsers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from parallax_gen.cli.text import print_text
from parallax_gen.codegen import device
from parallax_gen.environment import BATCH_INVARIANT
from parallax_gen.errors import ArgumentError, UnknownGpuError
from parallax_gen.memory.place import Place, place_of
from parallax_gen.problem.hardware import GPUS, STAND_IN, Gpu, gpu_by_name
from parallax_gen.problem.shapes import bucket_of, representative, sizes_of
from parallax_gen.problem.spec import CACHE_DTYPES, DTYPES, LARGEST_HEAD_DIM
from parallax_gen.problem.steps import Step, step_at
from parallax_gen.problem.workloads import (
    NO_FLAGS,
    OPS_AND_TRAINING,
    OPS_WITH_FLAG,
    USUAL_HEAD_DIM,
    Flags,
    Sizes,
    has_flag,
    has_kernel,
    usual_shapes,
)

Command = TypeVar("Command", bound=Callable[..., Any])


def parse_sizes(text: str) -> Sizes:
    """Parse sizes such as 4,16,4096 or 1,32/8,128x4096. Raises BadParameter."""
    sizes = Sizes.from_text(text)
    if sizes is None:
        raise click.BadParameter(
            f"{text!r} is not batch,heads,seqlen, such as 4,16,4096, or 1,32/8,128x4096 "
            "for 32 query heads over 8 kv heads and 128 queries over 4096 keys"
        )
    try:
        sizes.for_op("decode")  # a Shape checks its sizes
    except ArgumentError as error:
        raise click.BadParameter(f"{text!r}: {error}") from error
    return sizes


@dataclass(frozen=True)
class KernelArgs:
    """The kernels that --op, --head-dim, --dtype and the flags select. Their group comes from a shape's heads.

    op        "" if it was not given, TRAINING for the four kernels of a step
    head_dim  None, like dtype, if it was not given
    """

    op: str
    head_dim: int | None = None
    dtype: str | None = None
    flags: Flags = NO_FLAGS

    def step(self, sizes: Sizes | None) -> Step:
        """The kernels at these sizes; by default at the first of the op's usual shapes."""
        shape = next(iter(usual_shapes(self.op).values()))[0] if sizes is None else sizes.for_op(self.op)
        window = self.flags.window
        if window and window >= shape.seqlen_kv and not self.flags.batch_invariant:
            click.echo(f"--window {window} covers all {shape.seqlen_kv} keys, so it is ignored", err=True)
        return step_at(self.op, self.head_dim or USUAL_HEAD_DIM, self.dtype or "bf16", shape, self.flags)

    def matches(self, place: Place) -> bool:
        """Whether calls of these kernels, with any group and at sizes of a place's bucket, get what the place has."""
        windowed = bool(self.flags.window) and has_flag(place.spec.public_op, "window")
        if place.spec.window != windowed or not has_kernel(self.op, place.spec):
            return False
        shape = representative(place.bucket, place.spec.group)
        step = step_at(self.op, self.head_dim or USUAL_HEAD_DIM, self.dtype or "bf16", shape, self.flags)
        return place in [place_of(place.gpu, call.spec, call.shape) for call in step.calls]


def parse_head_dim(text: str | int) -> int:
    """Parse a head_dim that kernels support. Raises BadParameter."""
    try:
        head_dim = int(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a valid integer") from error
    if head_dim % 8 or not 0 < head_dim <= LARGEST_HEAD_DIM:
        raise click.BadParameter(f"{head_dim} is not a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
    return head_dim


def complete_gpu(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion: the GPU names that begin with `incomplete`."""
    return [name for name in GPUS if name.startswith(incomplete.lower())]


gpu_option = click.option(
    "--gpu",
    metavar="NAME",
    shell_complete=complete_gpu,
    help="Such as h100 or h200. Default: the card in this machine.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")

SHAPE_HELP = (
    "batch,heads,seqlen: heads 32/8 are 32 query heads over 8 kv heads, seqlen 128x4096 is 128 queries over "
    "4096 keys. For decode, a single length is the cache's, with one query per sequence."
)


def shape_option(
    *, required: bool = False, multiple: bool = False, more_help: str = ""
) -> Callable[[Command], Command]:
    name = "shapes" if multiple else "shape"
    return click.option(
        "--shape",
        name,
        type=parse_sizes,
        metavar="SHAPE",
        required=required,
        multiple=multiple,
        help=f"{SHAPE_HELP} {more_help}".strip(),
    )


# Flag -> its options, for messages. Whether queries are multi-token comes from the shape.
_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in OPS_WITH_FLAG}
_OPTIONS |= {"causal": "--causal or --full", "per_sequence_lengths": "--ragged"}


def flag_options(command: Command, *, for_bench: bool = False) -> Command:
    """Add the options that set a kernel's flags; the command gets them as one argument, `flags`.

    for_bench  allow several page sizes, and 0 for none: the command gets `page_sizes`, and flags.page_size is 0. The
               process's mode does not set batch_invariant, which adds a baseline
    """

    @functools.wraps(command)
    def collect(**options_by_name: Any) -> Any:
        flag_values = {name: options_by_name.pop(name) for name in _OPTIONS}
        page_size = 0 if for_bench else options_by_name.pop("page_size") or 0
        flags = Flags(page_size=page_size, cache_dtype=options_by_name.pop("cache_dtype") or "", **flag_values)
        return command(flags=flags, **options_by_name)

    names = ("--page-size", *("page_sizes",) * for_bench)
    more_help = ", 0 for none. Repeatable: every shape runs with each." if for_bench else "."
    options = (
        click.option("--causal/--full", default=None, help="Causal mask (the default), or every key."),
        click.option(
            "--window", type=click.IntRange(min=1), metavar="N", help="Sliding window of N keys; causal only."
        ),
        click.option("--varlen", is_flag=True, help="Packed sequences, one per batch entry, of the shape's lengths."),
        click.option("--stats", is_flag=True, help="Forward and decode: also return lse, t_mean and v_mean."),
        click.option(
            "--ragged", "per_sequence_lengths", is_flag=True, help="Decode only: every sequence has its own length."
        ),
        click.option("--leftpad", is_flag=True, help="Decode only: left padding, each sequence has its own first key."),
        click.option(
            *names,
            type=click.IntRange(min=0 if for_bench else 1),
            multiple=for_bench,
            metavar="N",
            help=f"Decode only: pages of N keys{more_help}",
        ),
        click.option("--softcap", is_flag=True, help="Scores s become c tanh(s/c); c is an argument of calls."),
        click.option("--cache-dtype", type=click.Choice(CACHE_DTYPES[1:]), help="Decode only: an 8-bit cache."),
        click.option(
            "--batch-invariant/--no-batch-invariant",
            envvar=None if for_bench else BATCH_INVARIANT,
            show_envvar=True,
            help="A sequence's bits do not depend on the batch around it.",
        ),
    )
    return with_options(collect, options)  # type: ignore[return-value]


def without_mode(flags: Flags) -> Flags:
    """The flags that options set: without batch_invariant if only the process's mode set it."""
    source = click.get_current_context().get_parameter_source("batch_invariant")
    return replace(flags, batch_invariant=flags.batch_invariant and source is not ParameterSource.ENVIRONMENT)


def check_flags(flags: Flags, ops: Sequence[str]) -> None:
    """Raise UsageError for a flag that none of the ops supports."""
    for name, options in _OPTIONS.items():
        is_set = flags.causal is not None if name == "causal" else bool(getattr(flags, name))
        supporting = [op for op in OPS_AND_TRAINING if has_flag(op, name)]
        if is_set and not set(ops) & set(supporting):
            raise click.UsageError(f"{options} needs --op {' or '.join(supporting)}, not {' or '.join(ops)}")
    for option, value in (("--page-size", flags.page_size), ("--cache-dtype", flags.cache_dtype)):
        if value and "decode" not in ops:
            raise click.UsageError(f"{option} needs --op decode, not {' or '.join(ops)}")


def kernel_options(command: Command, *, default: str = "") -> Command:
    """Add the options that select kernels; the command gets them as one argument, `requested`: a KernelArgs.

    default  what they select if they are not given; "" for a kernel of the usual head_dim and dtype
    """

    @functools.wraps(command)
    def collect(**options_by_name: Any) -> Any:
        requested = KernelArgs(
            op=options_by_name.pop("op") or "",
            **{name: options_by_name.pop(name) for name in ("head_dim", "dtype", "flags")},
        )
        if requested.op:
            check_flags(requested.flags, (requested.op,))
        return command(requested=requested, **options_by_name)

    options = (
        click.option("--op", type=click.Choice(OPS_AND_TRAINING), help="training: the four kernels of a step."),
        click.option("--head-dim", type=parse_head_dim, metavar="N", help=f"Default: {default}{USUAL_HEAD_DIM}."),
        click.option("--dtype", type=click.Choice(DTYPES), help=f"Default: {default}bf16, or the model's."),
    )
    return with_options(flag_options(collect), options)  # type: ignore[return-value]


def print_bucket(sizes: Sizes, ops: Sequence[str]) -> None:
    """Say on standard error which bucket a --shape means for each op, unless its sizes are the bucket's own."""
    for shape in dict.fromkeys(sizes.for_op(op) for op in ops):
        bucket = bucket_of(shape)
        own = shape.batch * shape.kv_heads, shape.seqlen_q, shape.seqlen_kv
        if own != (bucket.kv_rows, bucket.seqlen_q, bucket.seqlen_kv):
            print_text(f"--shape {sizes} means the bucket {bucket}, one config for {sizes_of(bucket)}", err=True)


def check_file(option: str, path: Path) -> None:
    """Raise BadParameter for a missing file, where it is read: Click's own check would read the file of an example."""
    if not path.exists():
        raise click.BadParameter(f"File '{path}' does not exist.", param_hint=f"'{option}'")


def with_options(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    """Add options, in their order in the help."""
    for option in reversed(options):
        command = option(command)
    return command


def chosen_gpu(name: str | None) -> Gpu:
    """The GPU named by --gpu; without --gpu the card in this machine. Raises UnknownGpuError."""
    return resolve_gpu(name, lambda: device.gpu_here(0))


def gpu_or_stand_in(name: str | None, card_here: Callable[[], Gpu | None]) -> Gpu:
    """`resolve_gpu` for commands that need no card: without --gpu and a card the STAND_IN, with a note."""
    if name is not None or card_here() is not None:
        return resolve_gpu(name, card_here)
    click.echo(f"no CUDA device here, so this is for {STAND_IN}: --gpu names another card", err=True)
    return GPUS[STAND_IN]


def resolve_gpu(name: str | None, card_here: Callable[[], Gpu | None]) -> Gpu:
    """`chosen_gpu`, with a function that finds the card in this machine."""
    if name is None:
        card = card_here()
        if card is None:
            raise UnknownGpuError("there is no CUDA device here: name a GPU, such as --gpu h200")
        return card
    try:
        return gpu_by_name(name)
    except UnknownGpuError:
        card = card_here()  # a card that is not in the table keeps the name that it was detected with
        if card is not None and card.name == name:
            return card
        raise
