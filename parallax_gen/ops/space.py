"""Which configs there are, the one predicate that says what cannot work, and where to begin: loops over the ops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace

from parallax_gen.errors import ConfigError
from parallax_gen.ops.base import KernelConfig, Knob, Value, config_from_dict, op_of
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec


def knobs_of(spec: KernelSpec) -> tuple[Knob, ...]:
    """The op's knobs, without the values that no config of this spec can use."""
    op = op_of(spec)
    return tuple(replace(knob, values=op.usable(spec, knob)) for knob in op.knobs)


def why_invalid(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> str | None:
    """Why `config` cannot serve `spec` on `gpu`, in a sentence; None when it can be tried.

    The one predicate of tuner, heuristics and dispatcher. What only compiling can show (registers, spills)
    is not its business.
    """
    op = op_of(spec)
    if type(config) is not op.config:
        return f"a {type(config).__name__} does not configure a {spec.family} kernel"
    for knob in op.knobs:
        value = getattr(config, knob.name)
        if value not in knob.values:
            return f"{knob.name} is {value}; it may be one of {', '.join(map(str, knob.values))}"
    reason = op.why_invalid(spec, config, gpu)
    if reason is None and (shared := shared_bytes(spec, config, gpu)) > gpu.shared_per_block:
        reason = f"its tiles need {shared} bytes of shared memory; a block of {gpu.title} has {gpu.shared_per_block}"
    return reason


def shared_bytes(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> int:
    """Shared memory a kernel needs: of decode what Triton allocates, of the other ops the least of it."""
    return op_of(spec).shared_bytes(spec, config, gpu)


def most_shared_bytes(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> int:
    """Shared memory that a kernel can take, where `shared_bytes` is what its tiles take at the least."""
    return shared_bytes(spec, config, gpu) + op_of(spec).room_bytes(spec, config, gpu)


def neighbours(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> list[KernelConfig]:
    """The valid configs that differ from `config` in one knob by one step."""
    found: list[KernelConfig] = []
    for knob in knobs_of(spec):
        for value in knob.neighbours(getattr(config, knob.name)):
            near = coerce(spec, {**asdict(config), knob.name: value})
            if near not in found and near != config and why_invalid(spec, near, gpu) is None:
                found.append(near)
    return found


def every_config(spec: KernelSpec, gpu: Gpu) -> Iterator[KernelConfig]:
    """Every valid config, each once."""
    knobs = knobs_of(spec)
    for values in itertools.product(*(knob.values for knob in knobs)):
        config = config_from_dict(spec.op, dict(zip((knob.name for knob in knobs), values, strict=True)))
        if why_invalid(spec, config, gpu) is None:
            yield config


def coerce(spec: KernelSpec, choices: dict[str, Value]) -> KernelConfig:
    """The config nearest to `choices` whose knobs agree with each other: one split has nothing to merge, say."""
    return config_from_dict(spec.op, op_of(spec).coerce(spec, choices))


def default_config(spec: KernelSpec, shape: Shape, gpu: Gpu) -> KernelConfig:
    """A config that is valid for `spec` on `gpu` and reasonable for `shape`. Raises ConfigError if none is.

    It is what is used where nothing was measured: the tuner's first trial and the dispatcher's last resort.
    """
    candidates: list[KernelConfig] = op_of(spec).defaults(spec, shape, gpu)
    reasons = [why_invalid(spec, config, gpu) for config in candidates]
    valid = [config for config, reason in zip(candidates, reasons, strict=True) if reason is None]
    if valid:
        return next((config for config in valid if _has_room(spec, config, gpu)), valid[-1])
    raise ConfigError(f"no default config fits {spec} on {gpu.title}: {'; '.join(map(str, reasons))}")


def _has_room(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> bool:
    """Whether shared memory will do for more than the predicate counts: a default gets no second try."""
    return most_shared_bytes(spec, config, gpu) <= gpu.shared_per_block


def promising_configs(spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[KernelConfig]:
    """The default, and what else was fast somewhere: where a search had better begin."""
    op = op_of(spec)
    found = [default_config(spec, shape, gpu), *op.defaults(spec, shape, gpu)]
    found += op.promising(spec, found)
    return [config for config in dict.fromkeys(found) if why_invalid(spec, config, gpu) is None]


def timed_lengths(spec: KernelSpec, shape: Shape) -> tuple[tuple[int, ...], ...]:
    """The keys of each sequence in the batches that a kernel is timed at."""
    return op_of(spec).timed_lengths(spec, shape)


def timed_shape(spec: KernelSpec, shape: Shape) -> Shape:
    """The shape of equal lengths that is as much work as a batch of `timed_lengths` on the average."""
    batches = timed_lengths(spec, shape)
    return replace(shape, seqlen_kv=max(1, round(sum(map(sum, batches)) / (len(batches) * shape.batch))))
