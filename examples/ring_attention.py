"""Ring attention over several GPUs: check the results, time each step, and time the passing of keys and values alone.

    python examples/ring_attention.py --tokens 65536              on all GPUs of this machine
    torchrun --nproc-per-node 4 examples/ring_attention.py        as a job over several machines is started

Without a GPU it runs a small example on two processes over gloo.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from parallax_gen import parallax_attn_func
from parallax_gen.distributed import gather_sequence, ring_attn_func, shard_sequence, share_tuning

ON_GPU = torch.cuda.is_available()
WARM, TIMED = 2, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536] if ON_GPU else [64])
    parser.add_argument("--heads", type=int, default=16 if ON_GPU else 2)
    parser.add_argument("--head-dim", type=int, default=128 if ON_GPU else 16)
    parser.add_argument("--full", action="store_true", help="every query sees every key, instead of causal")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if ON_GPU else 2)
    options = parser.parse_args()
    if "RANK" in os.environ:  # started by torchrun
        work(int(os.environ.get("LOCAL_RANK", "0")), options)
        return
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    os.environ["WORLD_SIZE"] = str(options.ranks)
    mp.spawn(work_of_child, (options,), nprocs=options.ranks)


def work_of_child(rank: int, options: argparse.Namespace) -> None:
    os.environ["RANK"] = str(rank)
    work(rank, options)


def work(local_rank: int, options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", message="parallax_gen: these are CPU tensors")
    if ON_GPU:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    try:
        shared = share_tuning()
        ranks, causal = dist.get_world_size(), not options.full
        print_on_rank_0(f"{ranks} ranks choose from the same {shared} records; {'causal' if causal else 'full'}")
        check(options.heads, options.head_dim, causal)
        for tokens in options.tokens:
            measure(tokens, options.heads, options.head_dim, causal)
    finally:
        dist.destroy_process_group()


def print_on_rank_0(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def normal(*size: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda" if ON_GPU else "cpu").manual_seed(seed)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    return torch.randn(*size, generator=generator, device=generator.device, dtype=dtype)


def check(heads: int, head_dim: int, causal: bool) -> None:
    """Compare the ring's output and gradients with those of one rank that has the whole sequence."""
    tokens = dist.get_world_size() * (1024 if ON_GPU else 8)
    *inputs, do = (x.detach() for x in sequences(tokens, heads, head_dim, seed=0))
    mine = [shard_sequence(x, causal=causal).requires_grad_() for x in inputs]
    out = ring_attn_func(*mine, causal=causal)
    grads = torch.autograd.grad(out, mine, shard_sequence(do, causal=causal))
    alone = [x.clone().requires_grad_() for x in inputs]
    expected = parallax_attn_func(*alone, causal=causal)
    expected_grads = torch.autograd.grad(expected, alone, do)
    names = ("out", "dq", "dr", "dk", "dv")
    for name, part, whole in zip(names, (out, *grads), (expected.detach(), *expected_grads), strict=True):
        result = gather_sequence(part, causal=causal)
        error = float((result.double() - whole.double()).norm() / whole.double().norm())
        print_on_rank_0(f"  {name}: off by {error:.1e} of the norm from one rank's")
        assert error < 2e-2, name  # parts are rounded to 16 bits before they are merged


def measure(tokens: int, heads: int, head_dim: int, causal: bool) -> None:
    """Print milliseconds and TFLOP/s per card of the ring and of one card, and the time of passing keys and values."""
    ranks = dist.get_world_size()
    times = time_forward_and_step(
        ring_attn_func, sequences(tokens // ranks, heads, head_dim, seed=5 * dist.get_rank()), causal
    )
    k, v = (normal(1, tokens // ranks, heads, head_dim, seed=n) for n in (2, 3))
    passing = median_ms(lambda: pass_around(k, v))
    alone = (float("nan"),) * 2
    if dist.get_rank() == 0:  # the other ranks wait
        alone = time_forward_and_step(
            parallax_attn_func, sequences(tokens, heads, head_dim, seed=0), causal, alone=True
        )
    dist.barrier()
    flop = 8 * heads * tokens**2 * head_dim * (0.5 if causal else 1.0)  # the forward has 4 matmuls, a step 12
    for name, ours, one, work in zip(("forward", "step"), times, alone, (flop, 3 * flop), strict=True):
        rate, single = work / ranks / ours / 1e9, work / one / 1e9
        print_on_rank_0(
            f"{tokens} tokens, {name}: {ours:.2f} ms on {ranks} cards, {rate:.0f} TFLOP/s a card; "
            f"one alone {one:.2f} ms, {single:.0f} TFLOP/s: {100 * rate / single:.0f} %"
        )
    print_on_rank_0(
        f"{tokens} tokens, passing keys and values around once, without compute that hides it: {passing:.2f} ms"
    )


def sequences(tokens: int, heads: int, head_dim: int, seed: int) -> list[Tensor]:
    """q, r, k and v, which require gradients, and the gradient of the output."""
    drawn = [normal(1, tokens, heads, head_dim, seed=seed + n) for n in range(5)]
    drawn[1] /= head_dim**0.5
    return [x.requires_grad_(n < 4) for n, x in enumerate(drawn)]


def time_forward_and_step(
    attention: Callable[..., Tensor], inputs: list[Tensor], causal: bool, *, alone: bool = False
) -> tuple[float, float]:
    """Milliseconds of a forward without gradients, and of a training step."""
    *given, do = inputs

    def step() -> None:
        torch.autograd.grad(attention(*given, causal=causal), given, do)

    with torch.no_grad():
        forward = median_ms(lambda: attention(*given, causal=causal), alone=alone)
    return forward, median_ms(step, alone=alone)


def pass_around(k: Tensor, v: Tensor) -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for _ in range(ranks - 1):
        arriving = torch.empty_like(k), torch.empty_like(v)
        sent = [dist.P2POp(dist.isend, x, (rank + 1) % ranks) for x in (k, v)]
        received = [dist.P2POp(dist.irecv, x, (rank - 1) % ranks) for x in arriving]
        for each in dist.batch_isend_irecv([*sent, *received]):
            each.wait()
        k, v = arriving


def median_ms(call: Callable[[], object], *, alone: bool = False) -> float:
    """The median of a few calls, each timed from when all ranks are ready until the last rank ends."""
    times = []
    for n in range(WARM + TIMED):
        wait(alone)
        start = time.perf_counter()
        call()
        wait(alone)
        if n >= WARM:
            times.append(time.perf_counter() - start)
    return sorted(times)[TIMED // 2] * 1e3


def wait(alone: bool) -> None:
    if ON_GPU:
        torch.cuda.synchronize()
    if not alone:
        dist.barrier()
        if ON_GPU:
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
