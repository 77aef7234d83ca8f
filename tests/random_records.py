"""Random records: a few kernels with arbitrary evidence, at random places, their near buckets and sibling cards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from strategies import random_spec

from parallax_gen.codegen.render import render
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import default_of, evidence_of, near_places, siblings
from parallax_gen.memory.result import PROTOCOL, Evidence, Outcome, Result
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.space import coerce, knobs_of, why_invalid
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import DTYPES, OPS, KernelSpec

GPU = GPUS["h200"]


def random_config(draw: random.Random, spec: KernelSpec) -> KernelConfig:
    """A random value for each knob; no card need be able to run the config."""
    return coerce(spec, {knob.name: draw.choice(knob.values) for knob in knobs_of(spec)})


def random_result(draw: random.Random, place: Place, configs: Sequence[KernelConfig]) -> Result:
    """A result at the place: today's kernel or another, this toolchain or another, current or legacy."""
    card, config = GPUS.get(place.gpu, GPU), draw.choice(configs)
    kernel, text = (f"{draw.getrandbits(128):032x}" for _ in range(2))
    evidence = Evidence.here(kernel, draw.choice(("", text)))
    if why_invalid(place.spec, config, card) is None and draw.random() < 0.5:
        evidence = evidence_of(render(place.spec, config, card))
    if draw.random() < 0.2:
        evidence = replace(evidence, kernel="", text="", templates=draw.choice(("abc", "7c01cbe51c52")))
    if draw.random() < 0.4:
        triton = draw.choice(("3.6", "3.6.1", "3.9.0", "4.0.0", "", "main"))
        evidence = replace(evidence, triton=triton, cuda=draw.choice(("", "12.8/12.9", "13.0")))
    evidence = replace(evidence, protocol=draw.choice((0, PROTOCOL, PROTOCOL, PROTOCOL)))
    outcome = draw.choice(("ok", "ok", "ok", *Outcome))
    created_at = f"2026-{draw.randint(1, 12):02}-01T00:00:00+00:00"
    return Result(place, evidence, config, outcome, time_us=draw.uniform(1.0, 99.0), created_at=created_at)


def random_kernel_configs(draw: random.Random) -> dict[KernelSpec, list[KernelConfig]]:
    """A few configs by spec, half of them valid. Each kernel is rendered once, so there are few."""
    kernels: dict[KernelSpec, list[KernelConfig]] = {}
    for op in (*OPS, "decode_varlen", "forward"):
        spec = random_spec(draw, op, DTYPES)
        valid = [default_of(Place("h200", spec, Bucket(8, 1024, 1024)), GPU)]
        while len(valid) < 4:
            config = random_config(draw, spec)
            valid += [config] if why_invalid(spec, config, GPU) is None else []
        kernels[spec] = [*valid, *(random_config(draw, spec) for _ in range(4))]
    return kernels


def random_support(draw: random.Random, place: Place, card: Gpu) -> list[Result]:
    """A search at a near bucket: today's default, in two of three at most 3 % slower than the best, and two others."""
    near, default = draw.choice(near_places(place, card)), default_of(place, card)
    others = (random_config(draw, place.spec) for _ in range(1000))
    configs = [config for config in others if why_invalid(place.spec, config, card) is None and config != default][:2]
    times = [draw.uniform(9.71, 10.6), 10.0, draw.uniform(10.0, 20.0)]
    return [
        Result(near, evidence_of(render(place.spec, config, card)), config, "ok", time_us=us)
        for config, us in zip((default, *configs), times, strict=False)
    ]


def random_records(
    draw: random.Random, kernels: dict[KernelSpec, list[KernelConfig]], most: int
) -> tuple[Place, list[Result]]:
    """A place, and up to `most` results at the place and at places near it."""
    spec = draw.choice(list(kernels))
    seqlen_q = 1 if spec.public_op == "decode" and not spec.multi_token else 2 ** draw.randint(7, 12)
    window = draw.choice((128, 1024)) if spec.window else 0
    bucket = Bucket(2 ** draw.randint(0, 8), seqlen_q, 2 ** draw.randint(7, 14), window)
    card = GPUS[draw.choice(("h200", "h200", "h100", "h100-pcie", "a100", "rtx4090"))]
    place = Place(card.name, spec, bucket)
    others = (name for name, gpu in GPUS.items() if not gpu.is_amd)  # stored answers are of draws from these
    names = (*(card.name,) * 6, *siblings(card), *others, "a card that nobody knows")
    nearby = (*[place] * 8, *(near for near in near_places(place, card) if near.gpu == card.name))
    places = [replace(draw.choice(nearby), gpu=draw.choice(names)) for _ in range(draw.randint(0, most))]
    return place, [random_result(draw, of, kernels[spec]) for of in places]
