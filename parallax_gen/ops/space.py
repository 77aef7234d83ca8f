"""The space of configs of any op: its knobs, the predicate that says which are valid, neighbours, and defaults."""

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
    """Why `config` cannot serve `spec` on `gpu`, in a sentence; None if it can be tried.

    Tuner, heuristics and dispatcher all use this predicate. It does not predict what only compiling shows, such as
    spills.
    """
    op = op_of(spec)
    if type(config) is not op.config:
        return f"a {type(config).__name__} does not configure a {spec.public_op} kernel"
    for knob in op.knobs:
        value = getattr(config, knob.name)
        if value not in knob.values:
            return f"{knob.name} is {value}; it may be one of {', '.join(map(str, knob.values))}"
    if spec.dtype == "tf32" and not gpu.has_tf32:
        return f"{gpu.title} has no matmuls in tf32: use fp32, bf16 or fp16"
    reason = op.why_invalid(spec, config, gpu)
    if reason is None and (shared := shared_bytes(spec, config, gpu)) > gpu.shared_per_block:
        reason = f"its tiles need {shared} bytes of shared memory; a block of {gpu.title} has {gpu.shared_per_block}"
    return reason


def shared_bytes(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> int:
    """The shared memory that a kernel needs: for decode what Triton allocates, for other ops the least that it may."""
    return op_of(spec).shared_bytes(spec, config, gpu)


def most_shared_bytes(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> int:
    """The most shared memory that a kernel may take; `shared_bytes` is the least."""
    return shared_bytes(spec, config, gpu) + op_of(spec).extra_shared_bytes(spec, config, gpu)


def neighbours(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> list[KernelConfig]:
    """The valid configs that differ from `config` in one knob by one step."""
    nearby: list[KernelConfig] = []
    for knob in knobs_of(spec):
        for value in knob.neighbours(getattr(config, knob.name)):
            near = coerce(spec, {**asdict(config), knob.name: value})
            if near not in nearby and near != config and why_invalid(spec, near, gpu) is None:
                nearby.append(near)
    return nearby


def every_config(spec: KernelSpec, gpu: Gpu) -> Iterator[KernelConfig]:
    """Every valid config, each once."""
    config_class = op_of(spec).config  # its fields are the knobs, in order
    for values in itertools.product(*(knob.values for knob in knobs_of(spec))):
        config = config_class(*values)
        if why_invalid(spec, config, gpu) is None:
            yield config


def coerce(spec: KernelSpec, choices: dict[str, Value]) -> KernelConfig:
    """The nearest config whose knobs are consistent with each other: one split, for example, has no merge."""
    return config_from_dict(spec.op, op_of(spec).coerce(spec, choices))


def default_config(spec: KernelSpec, shape: Shape, gpu: Gpu) -> KernelConfig:
    """A config that is valid for `spec` on `gpu` and reasonable for `shape`. Raises ConfigError if there is none.

    It needs no measurement: it is the tuner's first trial and the dispatcher's last resort.
    """
    candidates: list[KernelConfig] = op_of(spec).defaults(spec, shape, gpu)
    reasons = [why_invalid(spec, config, gpu) for config in candidates]
    valid = [config for config, reason in zip(candidates, reasons, strict=True) if reason is None]
    if valid:
        return next((config for config in valid if _surely_fits(spec, config, gpu)), valid[-1])
    raise ConfigError(f"no default config fits {spec} on {gpu.title}: {'; '.join(map(str, dict.fromkeys(reasons)))}")


def _surely_fits(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> bool:
    """Whether even the most shared memory that the kernel may take fits: a default gets no second try."""
    return most_shared_bytes(spec, config, gpu) <= gpu.shared_per_block


def promising_configs(spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[KernelConfig]:
    """The default and other configs that were fast for some spec: a search should begin with these."""
    op = op_of(spec)
    defaults = [default_config(spec, shape, gpu), *op.defaults(spec, shape, gpu)]
    configs = dict.fromkeys([*defaults, *op.promising(spec, defaults)])
    return [config for config in configs if why_invalid(spec, config, gpu) is None]


def timed_lengths(spec: KernelSpec, shape: Shape) -> tuple[tuple[int, ...], ...]:
    """Each timed batch's numbers of keys per sequence."""
    return op_of(spec).timed_lengths(spec, shape)


def timed_shape(spec: KernelSpec, shape: Shape) -> Shape:
    """The shape with equal lengths that has the average work of the batches of `timed_lengths`."""
    batches = timed_lengths(spec, shape)
    return replace(shape, seqlen_kv=max(1, round(sum(map(sum, batches)) / (len(batches) * shape.batch))))
