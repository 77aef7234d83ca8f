"""Tune one kernel: eight trials of a small decode bucket. On a machine without a GPU it compiles and predicts."""

from __future__ import annotations

from parallax_gen import KernelSpec, Shape, tune


def main() -> None:
    spec = KernelSpec("decode", head_dim=128, dtype="bf16", group=4)
    shape = Shape(batch=1, heads=32, kv_heads=8, seqlen_q=1, seqlen_kv=4096)
    tuned = tune(kernels=(spec, shape), trials=8, time_budget_s=60)
    print(tuned)
    (kernel,) = tuned.kernels
    assert kernel.config is not None
    print(f"{'measured' if tuned.measured else 'predicted'} best: {kernel.config}")


if __name__ == "__main__":
    main()
