"""The kernels of batch-invariant training in Triton's CPU interpreter: packed, a sequence has the bits of its own call.

tests/gpu/test_batch_invariance_gpu.py checks the same through the public functions, in bf16, on a card.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallax_gen.codegen.abi import Inputs
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.memory.place import config_at
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.ops.dqdr import DqDrConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.preprocess import PreprocessConfig
from parallax_gen.oracle import verify
from parallax_gen.oracle.inputs import softmax_scale
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.spec import KernelSpec

# The GPU is silent where the interpreter warns: for a row without keys (0/0, log2(0)), and where sums overflow, which
# the forward's fixup kernel mends.
pytestmark = [
    pytest.mark.interpreter,
    *(
        pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
        for what in ("divide by zero", "overflow", "invalid")
    ),
]

HEAD_DIM, OF_QUERIES, OF_KEYS = 16, ("out", "v_mean", "lse", "t_mean", "dq", "dr"), ("dk", "dv")
Sequence = tuple[Tensor, ...]  # q, r, k, v and do, without a batch dimension


def configs_of(dtype: str, softmax: str) -> dict[str, KernelConfig]:
    rows = 32 if dtype == "fp32" else 64
    tile = {"BLOCK_M": rows, "BLOCK_N": rows, "GROUP_HEADS": 2, "num_warps": 4, "num_stages": 2}
    return {
        "forward": ForwardConfig(**tile, SOFTMAX=softmax),
        "preprocess": PreprocessConfig(BLOCK_M=16, num_warps=4),
        "dkdv": DkDvConfig(**tile),
        "dqdr": DqDrConfig(**tile),
    }


def launched(spec: KernelSpec, config: KernelConfig, inputs: Inputs) -> dict[str, Tensor]:
    config = config_at(spec, config)
    call = verify.poisoned_call(spec, config, inputs)
    load(render(spec, config, GPUS["h200"])).launch(*call.arguments(softmax_scale(spec)))
    return call.written


def step(spec: KernelSpec, inputs: Inputs, softmax: str) -> dict[str, Tensor]:
    """Results and gradients. The forward without statistics, which inference takes, has the same out."""
    configs = configs_of(spec.dtype, softmax)
    written = launched(spec.for_op("forward"), configs["forward"], inputs)
    of_inference = launched(replace(spec.for_op("forward"), stats=False), configs["forward"], inputs)
    torch.testing.assert_close(of_inference["out"], written["out"], rtol=0, atol=0, equal_nan=True)
    inputs = replace(inputs, **written)
    inputs = replace(inputs, **launched(spec.for_op("preprocess"), configs["preprocess"], inputs))
    for op in ("dkdv", "dqdr"):
        written |= launched(spec.for_op(op), configs[op], inputs)
    return written


def packed(
    sequences: list[Sequence], spec: KernelSpec, window: int, before: int, softmax: str
) -> list[dict[str, Tensor]]:
    """Each sequence's part of a packed step. before: rows of no sequence that come before the first."""
    q, r, k, v, do = map(torch.cat, zip(*sequences, strict=True))
    q, r, do = (torch.cat([x.new_full((before, *x.shape[1:]), float("nan")), x]) for x in (q, r, do))
    ends_q, ends_k = (
        [*itertools.accumulate((len(s[i]) for s in sequences), initial=first)] for i, first in ((0, before), (2, 0))
    )
    lengths = {
        "cu_seqlens_q": torch.tensor(ends_q, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(ends_k, dtype=torch.int32),
        "max_seqlen_q": max(len(s[0]) for s in sequences),
        "max_seqlen_k": max(len(s[2]) for s in sequences),
    }
    inputs = Inputs(q, r, k, v, do=do, window_size=window, softcap=5.0 if spec.softcap else 0.0, **lengths)
    written = step(replace(spec, varlen=True), inputs, softmax)

    def part(name: str, i: int) -> Tensor:
        ends = ends_k if name in OF_KEYS else ends_q
        rows = slice(ends[i], ends[i + 1])
        return written[name][:, rows] if name in ("lse", "t_mean") else written[name][rows]

    return [{name: part(name, i) for name in (*OF_QUERIES, *OF_KEYS)} for i in range(len(sequences))]


def alone(sequence: Sequence, spec: KernelSpec, window: int, softmax: str) -> dict[str, Tensor]:
    q, r, k, v, do = (x[None] for x in sequence)
    inputs = Inputs(q, r, k, v, do=do, window_size=window, softcap=5.0 if spec.softcap else 0.0)
    return {name: x[0] for name, x in step(spec, inputs, softmax).items()}


def check_random_batch(seed: int) -> None:
    draw, of_tensors = random.Random(seed), torch.Generator().manual_seed(seed)
    window = draw.choice((0, 0, 1, 33, 100))
    dtype, softmax = draw.choice((("fp16", "online"), ("fp32", "online"), ("fp32", "fixed_reference")))
    spec = KernelSpec(
        "forward",
        HEAD_DIM,
        dtype,
        group=draw.choice((1, 3)),
        causal=window > 0 or draw.random() < 0.7,
        window=window > 0,
        softcap=draw.random() < 0.2,
        batch_invariant=True,
    )

    def normal(rows: int, heads: int, scale: float = 1.0) -> Tensor:
        x = scale * torch.randn(rows, heads, HEAD_DIM, generator=of_tensors)
        return x.half() if dtype == "fp16" else x

    sequences = []
    for _ in range(3):
        keys = draw.choice((1, 2, 33, 70, 90))
        queries = keys if draw.random() < 0.5 else draw.choice((1, 5, 40))
        scale = draw.choice((1.0, 1.0, 40.0))  # the last overflows a fixed reference
        q, r, do = normal(queries, spec.group, scale), normal(queries, spec.group), normal(queries, spec.group)
        sequences.append((q, r, normal(keys, 1), normal(keys, 1), do))
    together = packed(sequences, spec, window, draw.choice((0, 5)), softmax)
    for i, (sequence, of_all) in enumerate(zip(sequences, together, strict=True)):
        for name, x in alone(sequence, spec, window, softmax).items():
            assert torch.equal(of_all[name].nan_to_num(nan=-7), x.nan_to_num(nan=-7)), (seed, i, name, spec)


@pytest.mark.parametrize("seed", range(6))
def test_a_packed_sequence_has_the_bits_it_has_alone(seed: int) -> None:
    check_random_batch(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 200, 20))
def test_100_random_batches(first: int) -> None:
    for seed in range(first, first + 20):
        check_random_batch(seed)
