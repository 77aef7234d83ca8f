"""The host time of a decode step: of the public function, and of the kernel launch inside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from parallax_gen.bench.baselines.ours import cached_attention
from parallax_gen.codegen.abi import prepare
from parallax_gen.codegen.build import load
from parallax_gen.codegen.device import gpu_here
from parallax_gen.codegen.intercept import Launch, watch_launches
from parallax_gen.codegen.render import render
from parallax_gen.oracle.inputs import random_inputs_of, softmax_scale
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import default_dispatcher

CALLS, ROUNDS = 100, 40  # the device is synchronised between rounds, so that no launch waits in a full queue

# What each time measures, by its key in the JSON output.
LABELS = {
    "public function": "parallax_attn_with_kvcache, with out given",
    "and an output": "parallax_attn_with_kvcache, which allocates out",
    "Triton's launch": "kernel[grid](...) of the main kernel",
    "compiled kernel": "Triton's innermost launcher of the main kernel",
}


def host_times(spec: KernelSpec, shape: Shape) -> dict[str, float]:
    """Microseconds of host time per call, by the keys of LABELS; medians over rounds of calls.

    `kernel[grid](...)` is timed on the arguments that the rendered `launch` passes to it.
    """
    gpu = gpu_here()
    assert gpu is not None
    choice, module = default_dispatcher().kernel(spec, shape, gpu)
    assert module is load(render(spec, choice.config, gpu))
    inputs = random_inputs_of(spec, shape, seed=0, device="cuda", full=True)
    call = prepare(spec, choice.config, inputs)
    launches: list[Launch] = []
    with watch_launches(module, launches.append):
        module.launch(*call.arguments(softmax_scale(spec)))
    main_kernel = launches[0]  # some configs also launch a kernel that merges the splits
    grid = (*main_kernel.grid, 1, 1)
    run = main_kernel.compiled[grid]

    calls: dict[str, Callable[[], Any]] = {
        "public function": cached_attention(spec, inputs, call.out),
        "and an output": cached_attention(spec, inputs, None),
        "Triton's launch": lambda: main_kernel.kernel[main_kernel.grid](*main_kernel.arguments, **main_kernel.options),
        "compiled kernel": lambda: run(*main_kernel.arguments),
    }
    return {name: _median_us(call) for name, call in calls.items()}


def _median_us(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)
