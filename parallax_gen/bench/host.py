"""What a decode step costs the host: the public function beside the bare launches below it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from parallax_gen.bench.baselines.peers import ours_cached
from parallax_gen.codegen.abi import prepare
from parallax_gen.codegen.build import load
from parallax_gen.codegen.device import gpu_of_device
from parallax_gen.codegen.render import render
from parallax_gen.oracle.inputs import random_inputs_of, softmax_scale
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import default_dispatcher

CALLS, ROUNDS = 100, 40  # the queue of launches is emptied between rounds, so that none waits for a place in it


def host_times(spec: KernelSpec, shape: Shape) -> dict[str, float]:
    """Microseconds of host time a call, by what is called; medians over rounds of calls.

    "public function" with a given `out`; "and an output" when it makes one. Below it: "Triton's launch", which is
    `kernel[grid](...)` on the arguments of the rendered `launch`; "compiled kernel", Triton's innermost launcher.
    """
    gpu = gpu_of_device(torch.cuda.current_device())
    choice, module = default_dispatcher().kernel(spec, shape, gpu)
    assert module is load(render(spec, choice.config, gpu))
    inputs = random_inputs_of(spec, shape, seed=0, device="cuda", full=True)
    call = prepare(spec, choice.config, inputs)
    grid, arguments, options, compiled = _watched(module, call.arguments(softmax_scale(spec)))
    whole_grid = (*grid, 1, 1)
    run = compiled[whole_grid]

    calls: dict[str, Callable[[], Any]] = {
        "public function": lambda: ours_cached(spec, inputs, call.out),
        "and an output": lambda: ours_cached(spec, inputs, None),
        "Triton's launch": lambda: kernel_of(module)[grid](*arguments, **options),
        "compiled kernel": lambda: run(*arguments),
    }
    return {name: _median_us(call) for name, call in calls.items()}


def _watched(module: Any, launch_arguments: tuple[object, ...]) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any]:
    """The grid, arguments, options and compiled kernel of its kernel in one launch."""
    kernel = kernel_of(module)
    run, seen = kernel.run, []

    def watch(*arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(*arguments, grid=grid, warmup=warmup, **options)
        seen.append((grid, arguments, options, compiled))
        return compiled

    kernel.run = watch
    try:
        module.launch(*launch_arguments)
    finally:
        del kernel.run
    grid, arguments, options, compiled = seen[0]
    return grid, arguments, options, compiled


def kernel_of(module: Any) -> Any:
    """A decode module's kernel over the keys."""
    return getattr(module, "ragged_kernel", None) or module.decode_kernel


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
