"""Gradients of a training step in fp32 on the CPU, with each of the kernels' roundings, any of which can be left out.

So one sees which rounding an error on peaked rows comes from, and what a change would bring before it is a kernel.
test_peaked_roundings.py compares with the kernels. The tables behind docs/use.md:

    python tests/codegen/peaked_roundings.py --head-dim 128
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from parallax_gen.oracle.peaked import KINDS, peaked
from parallax_gen.oracle.reference import Gradients, reference_backward

LOG2_E = 1.4426950408889634
BLOCK_N = 64


@dataclass(frozen=True)
class Roundings:
    """What is rounded, and how.

    v_mean, out  the bits of each that the backward reads. 24: 16 and an 8-bit residual in 1/256 of the last place,
                 32: 16 and a 16-bit residual, 0: fp32
    p            p and p (t - t_mean), operands of the forward, to 16 bits
    operands     p w, dt and ds, operands of the backward, to 16 bits
    results      dq, dr, dk and dv, to 16 bits
    arithmetic   all other numbers
    lse          whether the lse that the backward reads is of the "exact" or of the "rounded" p
    divisor      whether the forward divides o1 and o2 by the sum of the "exact" or of the "rounded" p
    softmax      the forward's SOFTMAX: "online", or "fixed_reference" in bf16
    """

    v_mean: int = 16
    out: int = 16
    p: bool = True
    operands: bool = True
    results: bool = True
    arithmetic: torch.dtype = torch.float32
    lse: str = "exact"
    divisor: str = "exact"
    softmax: str = "online"


TODAY = Roundings()


class Step(NamedTuple):
    """q, r, k, v and do: (batch, heads, seqlen, head_dim) in 16 bits."""

    q: Tensor
    r: Tensor
    k: Tensor
    v: Tensor
    do: Tensor

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)


def step_of(kind: str, head_dim: int, dtype: torch.dtype, seed: int, *, seqlen: int, heads: int, probes: float) -> Step:
    """Normal inputs of unit variance, changed to that kind. probes: what r is multiplied by."""
    generator = torch.Generator().manual_seed(seed)
    q, r, k, v, do = (torch.randn(1, seqlen, heads, head_dim, generator=generator) for _ in range(5))
    q, k = peaked(kind, q, k, generator)
    return Step(*(x.transpose(1, 2).to(dtype) for x in (q, probes * r, k, v, do)))


def exact_gradients(x: Step) -> Gradients:
    q, r, k, v, do = (y.transpose(1, 2) for y in x)
    return Gradients(*(y.transpose(1, 2) for y in reference_backward(q, r, k, v, do, causal=True)))


def rounded(x: Tensor, dtype: torch.dtype, only_if: bool = True) -> Tensor:
    return x.to(dtype).to(x.dtype) if only_if else x


def kept(x: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """x as a number of this 16-bit dtype and a residual of the other bits give it."""
    if not bits:
        return x.float().to(x.dtype)
    main = rounded(x, dtype)
    if bits == 32:
        return main + rounded(x - main, dtype)
    unit = torch.ldexp(torch.full_like(x, torch.finfo(dtype).eps / 2**9), torch.frexp(main).exponent)
    return main + ((x - main) / unit).round().clamp(-128, 127) * unit if bits == 24 else main


class Statistics(NamedTuple):
    lse2: Tensor  # log2(e) lse
    t_mean: Tensor
    v_mean: Tensor
    out: Tensor


def _scores(x: Step, arithmetic: torch.dtype) -> tuple[Tensor, Tensor]:
    q, r, k = (y.to(arithmetic) for y in (x.q, x.r, x.k))
    masked = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(masked, -torch.inf), r @ k.mT


def _forward(x: Step, s: Tensor, t: Tensor, how: Roundings) -> Statistics:
    """What templates/forward.py.j2 does, block by block of keys."""
    scale_log2, dtype, v = x.scale * LOG2_E, x.q.dtype, x.v.to(s.dtype)
    fixed = how.softmax == "fixed_reference"
    if fixed:  # the score of the first key, whose products are rounded to multiples of 2^-11
        products = x.q.to(s.dtype) * x.k[:, :, :1].to(s.dtype)
        m = (products * 2**11).round().sum(-1, keepdim=True) / 2**11 * scale_log2
    else:
        m = torch.full_like(s[..., :1], -1e30)
    d1, d1_rounded, d2, t_mean = (torch.zeros_like(m) for _ in range(4))
    o1, o2 = torch.zeros_like(v), torch.zeros_like(v)
    for keys in torch.arange(s.shape[-1]).split(BLOCK_N):
        s_block, t_block, v_block = s[..., keys], t[..., keys], v[:, :, keys]
        m_new = m if fixed else torch.maximum(m, s_block.amax(-1, keepdim=True) * scale_log2)
        alpha = (m - m_new).exp2()
        p = (s_block * scale_log2 - m_new).exp2()
        p_operand = rounded(p, dtype, how.p)
        d1 = d1 * alpha + p.sum(-1, keepdim=True)
        d1_rounded = d1_rounded * alpha + p_operand.sum(-1, keepdim=True)
        d2 = d2 * alpha + (p * t_block).sum(-1, keepdim=True)
        t_mean_new = d2 / d1
        o1 *= alpha
        o2 = o2 * alpha + (t_mean - t_mean_new) * o1
        o1 += p_operand @ v_block
        o2 += rounded(p * t_block - p * t_mean_new, dtype, how.p) @ v_block
        m, t_mean = m_new, t_mean_new
    divisor = d1_rounded if how.divisor == "rounded" else d1
    lse2 = m + (d1_rounded if how.lse == "rounded" else d1).log2()
    return Statistics(lse2, t_mean, o1 / divisor, (o1 - o2) / divisor)


def gradients(x: Step, how: Roundings) -> Gradients:
    """What the forward, preprocess, dkdv and dqdr do."""
    dtype, scale = x.q.dtype, x.scale
    s, t = _scores(x, how.arithmetic)
    saved = _forward(x, s, t, how)
    q, r, k, v, do = (y.to(how.arithmetic) for y in x)

    v_mean, out = kept(saved.v_mean, how.v_mean, dtype), kept(saved.out, how.out, dtype)
    dp_mean = (do * v_mean).sum(-1, keepdim=True)
    c = scale * (do * (v_mean - out)).sum(-1, keepdim=True)

    p = (s * (scale * LOG2_E) - saved.lse2).exp2()
    w = scale * (1 + saved.t_mean) - scale * t
    dt = p * (dp_mean - do @ v.mT)
    pw, dt_operand, ds = (rounded(y, dtype, how.operands) for y in (p * w, dt, p * c - w * dt))
    result = Gradients(ds @ k, dt_operand @ k, ds.mT @ q + dt_operand.mT @ r, pw.mT @ do / scale)
    return Gradients(*(rounded(y, dtype, how.results) for y in result))


def softmax_gradients(x: Step) -> dict[str, Tensor]:
    """dq, dk and dv of softmax attention: p, ds, out and the results have 16 bits, all else fp32."""
    dtype, scale = x.q.dtype, x.scale
    s, t = _scores(x, torch.float32)
    q, _, k, v, do = (y.float() for y in x)
    saved = _forward(x, s, torch.zeros_like(t), TODAY)
    delta = (do * rounded(saved.v_mean, dtype)).sum(-1, keepdim=True)
    p = (s * (scale * LOG2_E) - saved.lse2).exp2()
    ds = rounded(p * (do @ v.mT - delta), dtype)
    result = {"dq": scale * (ds @ k), "dk": scale * (ds.mT @ q), "dv": rounded(p, dtype).mT @ do}
    return {name: rounded(y, dtype) for name, y in result.items()}


Errors = dict[tuple[str, str], float]  # by what computed it, "softmax attention" or a name of `ways`, and the gradient


def relative_errors(steps: Iterable[Step], ways: Mapping[str, Roundings], unrounded: Iterable[Step] = ()) -> Errors:
    """Each gradient's error over its norm, both of all steps together.

    unrounded  inputs in fp32 that round to the steps: how far exact gradients move by that is "rounding of inputs"
    """
    difference: Errors = defaultdict(float)
    size: Errors = defaultdict(float)
    for x, before in itertools.zip_longest(steps, unrounded):
        exact, softmax = exact_gradients(x), exact_gradients(x._replace(r=torch.zeros_like(x.r)))
        results = {"softmax attention": (softmax_gradients(x), softmax)}
        results |= {way: (gradients(x, how)._asdict(), exact) for way, how in ways.items()}
        if before:
            results["rounding of inputs"] = (exact._asdict(), exact_gradients(before))
        for way, (result, expected) in results.items():
            for name, gradient in result.items():
                wanted = getattr(expected, name)
                difference[way, name] += (gradient - wanted).square().sum().item()
                size[way, name] += wanted.square().sum().item()
    return {key: (difference[key] / size[key]) ** 0.5 for key in difference}


FIXED = replace(TODAY, softmax="fixed_reference")
WAYS = {
    "today": TODAY,
    "lse of rounded p": replace(TODAY, lse="rounded"),
    "v_mean in 24 bits": replace(TODAY, v_mean=24),
    "v_mean in 32 bits": replace(TODAY, v_mean=32),
    "out in 32 bits": replace(TODAY, out=32),
    "both in 24 bits": replace(TODAY, v_mean=24, out=24),
    "both in 32 bits": replace(TODAY, v_mean=32, out=32),
    "both in fp32": replace(TODAY, v_mean=0, out=0),
    "p of the forward not rounded": replace(TODAY, p=False),
    "operands not rounded": replace(TODAY, operands=False),
    "results not rounded": replace(TODAY, results=False),
    "the rest in fp64": replace(TODAY, arithmetic=torch.float64),
    "both in fp32, p not rounded": replace(TODAY, v_mean=0, out=0, p=False),
    "both in fp32, operands not rounded": replace(TODAY, v_mean=0, out=0, operands=False),
    "fixed": FIXED,
    "fixed, lse of rounded p": replace(FIXED, lse="rounded"),
    "fixed, divided by rounded p": replace(FIXED, divisor="rounded"),
    "fixed, both of rounded p": replace(FIXED, divisor="rounded", lse="rounded"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--probes", type=float, default=1.0, help="what r is multiplied by")
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kind", choices=KINDS, action="append")
    given = parser.parse_args()
    torch.set_num_threads(1)  # of small matmuls more threads spend their time in waiting for each other
    sizes = {"seqlen": given.seqlen, "heads": given.heads, "probes": given.probes}

    def steps(kind: str, dtype: torch.dtype) -> Iterator[Step]:
        return (step_of(kind, given.head_dim, dtype, seed, **sizes) for seed in range(given.seeds))

    for kind in given.kind or KINDS:
        ways = {way: how for way, how in WAYS.items() if how.softmax == "online" or given.dtype == "bfloat16"}
        found = relative_errors(steps(kind, getattr(torch, given.dtype)), ways, steps(kind, torch.float32))
        print(f"\n| {kind} | dq | dr | dk | dv |\n|---|---|---|---|---|")
        for way in ("softmax attention", *ways, "rounding of inputs"):
            row = (f"{found[way, name]:.2e}" if (way, name) in found else "" for name in Gradients._fields)
            print(f"| {way} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
