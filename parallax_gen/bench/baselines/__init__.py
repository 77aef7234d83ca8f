"""The baselines, one file per package. Importing these files imports neither torch nor the packages."""

from __future__ import annotations

from parallax_gen.bench.baselines import fla, flash_attn, ours, parallax_kernel, torch_sdpa
from parallax_gen.bench.baselines.base import Baseline

# In the order of timing and display: ours first, then softmax attention, then other Parallax kernels.
BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for package in (ours, torch_sdpa, flash_attn, parallax_kernel, fla)
    for baseline in package.BASELINES
}
OURS, BATCH_INVARIANT = (baseline.name for baseline in ours.BASELINES)


def baselines_of(op: str) -> list[Baseline]:
    """The baselines that have a kernel for `op`: "forward", "decode" or TRAINING."""
    return [baseline for baseline in BASELINES.values() if baseline.has(op)]
