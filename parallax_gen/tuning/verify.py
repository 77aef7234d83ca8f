"""Checks a kernel against the fp64 oracle: on fresh random inputs, with every output poisoned first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallax_gen.codegen.build import load
from parallax_gen.codegen.calling import Call, Inputs, prepare
from parallax_gen.codegen.render import KernelSource
from parallax_gen.problem.config import DecodeConfig, KernelConfig
from parallax_gen.problem.reference import Reference, errors, random_inputs, reference_forward, why_wrong
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

POISON = float("nan")


def awkward_shape(spec: KernelSpec, config: KernelConfig) -> Shape:
    """A small shape that no tile of `config` divides: tails, a last group of heads, splits without keys."""
    kv_heads = 3
    if isinstance(config, DecodeConfig):
        blocks = min(2 * config.NUM_SPLITS + 1, 40)
        return Shape(4, kv_heads * spec.group, kv_heads, 1, blocks * config.BLOCK_N - 7)
    return Shape(1, kv_heads * spec.group, kv_heads, 2 * config.BLOCK_M + 11, 3 * config.BLOCK_N + 5)


def random_inputs_of(spec: KernelSpec, shape: Shape, *, seed: int, device: str, full: bool = False) -> Inputs:
    """Random inputs. Ragged lengths go from 0 to all (`full`: all), with NaN behind each sequence's end."""
    inputs = Inputs(*random_inputs(spec, shape, seed=seed, device=device))
    if spec.ragged:
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, shape.seqlen_kv + 1, (shape.batch,), generator=draw, dtype=torch.int32)
        shorter = torch.rand(shape.batch, generator=draw) < 0.5  # than a block of keys, often
        lengths = torch.where(shorter, lengths % 32, lengths)
        lengths[seed % shape.batch] = shape.seqlen_kv * (seed % 2)  # the two ends come up often
        if full:
            lengths.fill_(shape.seqlen_kv)
        behind = (torch.arange(shape.seqlen_kv) >= lengths[:, None]).to(device)
        inputs.k[behind] = POISON
        inputs.v[behind] = POISON
        inputs.cache_seqlens = lengths.to(device)
    return inputs


def poisoned(spec: KernelSpec, config: KernelConfig, inputs: Inputs) -> Call:
    """The call on these inputs with all that a launch is to write overwritten: nothing right is left from before."""
    call = prepare(spec, config, inputs)
    for tensor in (call.out, *call.stats, *call.scratch[:1]):  # the counters, second, count from 0
        tensor.fill_(POISON)
    return call


def oracle(spec: KernelSpec, inputs: Inputs) -> Reference:
    return reference_forward(
        inputs.q,
        inputs.r,
        inputs.k,
        inputs.v,
        causal=spec.causal,
        softmax_scale=softmax_scale(spec),
        cache_seqlens=inputs.cache_seqlens,
    )


def softmax_scale(spec: KernelSpec) -> float:
    return float(spec.head_dim**-0.5)


@dataclass(frozen=True)
class Verdict:
    """The relative error of the output, and what is wrong in a sentence, None where nothing is."""

    error: float
    wrong: str | None


def run(source: KernelSource, spec: KernelSpec, config: KernelConfig, inputs: Inputs, reference: Reference) -> Verdict:
    """Launch once on these inputs and judge all that it wrote."""
    call = poisoned(spec, config, inputs)
    load(source).launch(*call.arguments(softmax_scale(spec)))
    written = [("out", call.out, reference.out)]
    if call.stats:
        lse, t_mean, v_mean = call.stats
        # A row without keys has lse -inf on both sides: compare sums, not their logarithms.
        written.append(("exp(lse)", lse.exp(), reference.lse.exp()))
        written += [("t_mean", t_mean, reference.t_mean), ("v_mean", v_mean, reference.v_mean)]
    reasons = [f"{name}: {why}" for name, out, ref in written if (why := why_wrong(out, ref, spec.dtype))]
    if len(call.scratch) == 2 and bool(call.scratch[1].any()):
        reasons.append("its counters are not back at 0 for the next launch")
    return Verdict(errors(call.out, reference.out).relative, "; ".join(reasons) or None)


def check(
    source: KernelSource, spec: KernelSpec, config: KernelConfig, shape: Shape, *, seed: int, device: str
) -> Verdict:
    """`run` on fresh random inputs of a shape."""
    inputs = random_inputs_of(spec, shape, seed=seed, device=device)
    return run(source, spec, config, inputs, oracle(spec, inputs))
