"""Tune one kernel: eight trials of a small decode bucket. On a machine without a GPU it compiles and predicts."""

from __future__ import annotations

import torch

from parallax_gen.codegen.device import gpu_of_device
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.tuner import Tuner


def main() -> None:
    on_gpu = torch.cuda.is_available()
    gpu = gpu_of_device(0) if on_gpu else gpu_by_name("h200")
    spec = KernelSpec("decode", head_dim=128, dtype="bf16", group=4)
    shape = Shape(batch=1, heads=32, kv_heads=8, seqlen_q=1, seqlen_kv=4096)
    job = Job(spec, bucket_of(shape), gpu)

    def show(progress: Progress) -> None:
        if progress.best is not None:
            print(f"{progress.done} trials, best {progress.best.time_us:.1f} us")

    with Store() as store, Tuner(store, measure=on_gpu) as tuner:
        progress = tuner.tune(job, trials=8, time_budget_s=60, on_progress=show)
    assert progress.best is not None
    print(f"{'measured' if on_gpu else 'predicted'} best: {progress.best.config}")


if __name__ == "__main__":
    main()
