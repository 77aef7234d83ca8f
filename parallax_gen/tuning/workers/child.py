"""The child's side of tuning/workers/worker.py: compiles without a device, checks and times with one, dies alone."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import pickle
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from threading import Thread
from typing import TYPE_CHECKING

from parallax_gen.codegen.abi import Inputs, prepare
from parallax_gen.codegen.build import compile_for, load
from parallax_gen.codegen.device import gpu_here
from parallax_gen.codegen.render import render
from parallax_gen.errors import (
    CONTEXT_BYTES,
    MAYBE_MACHINE_ERRORS,
    OUT_OF_MEMORY,
    BuildError,
    ConfigError,
    MemoryTakenError,
    held_by_others,
    machine_error,
)
from parallax_gen.memory.result import Outcome
from parallax_gen.ops.base import Layout, op_of
from parallax_gen.ops.space import timed_lengths
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import bound_by_matmuls
from parallax_gen.tuning.job import step_of
from parallax_gen.tuning.workers.messages import Compile, Identify, Measure, Ready, Rematch, Request, Trial, TrialResult

if TYPE_CHECKING:
    from parallax_gen.oracle.verify import Expected, TrainingStep


def serve(*, device: bool) -> None:
    """Say that this child is ready, then answer requests until there are no more.

    A fault of the machine is a reply of its own, which the parent raises. Any other error that is no outcome ends the
    child: its parent sees a crash.
    """
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with the replies

    def reply(ask: Callable[[], object]) -> None:
        try:
            told = ask()
        except MAYBE_MACHINE_ERRORS as error:
            fault = machine_error(error)
            if fault is None:
                raise
            if isinstance(fault, MemoryTakenError):
                forget_inputs()
            told = fault
        pickle.dump(told, replies)
        replies.flush()

    reply(lambda: Ready(wake_device() if device else False))
    if device:
        Thread(target=import_what_gradients_need, daemon=True).start()
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:  # the parent is done, or gone
            return
        reply(partial(answer, request))


def answer(request: Request | Identify) -> TrialResult | Gpu | None:
    """The reply to a request. Raises what `machine_error` knows where the machine is at fault."""
    start = time.monotonic()
    if isinstance(request, Identify):
        return gpu_here(0)
    if isinstance(request, Compile):
        reply = compile_trial(request)
    elif isinstance(request, Measure):
        reply = measure_trial(request)
    else:
        reply = time_again(request)
    return dataclasses.replace(reply, seconds=time.monotonic() - start)


def compile_trial(request: Compile) -> TrialResult:
    """Compile for the trial's GPU. Needs no device."""
    trial = request.trial
    try:
        source = render(trial.spec, trial.config, trial.gpu)
        resources = compile_for(source, trial.spec, trial.config, trial.shape, trial.gpu)
    except ConfigError as error:
        return TrialResult(Outcome.INVALID, str(error))
    except BuildError as error:
        return TrialResult(Outcome.COMPILE, str(error))
    return TrialResult(Outcome.OK, resources=resources)


def measure_trial(request: Measure) -> TrialResult:
    """Check at an awkward shape and at the trial's own, then time at the trial's own."""
    from triton.runtime.errors import OutOfResources

    from parallax_gen.oracle import verify
    from parallax_gen.tuning.workers.measure import time_call

    trial = request.trial
    spec, config, shape = trial.spec, trial.config, trial.shape
    try:
        source = render(spec, config, trial.gpu)
        small = op_of(spec).awkward_shape(spec, config, shape.kv_heads)
        found = verify.check(source, spec, config, small, seed=random.randrange(2**31), device="cuda")
        if found.wrong:
            return TrialResult(Outcome.WRONG, f"at {small}: {found.wrong}", error=found.error)
        inputs, expected = _inputs_and_oracle(spec, shape)
        found = verify.run(source, spec, config, inputs, expected)
        if found.wrong:
            return TrialResult(Outcome.WRONG, f"at {shape}: {found.wrong}", error=found.error)
        batches = _batches(trial, inputs)
        timing = time_call(
            _call(trial, batches),
            timed_ms=request.timed_ms,
            give_up_us=request.give_up_us * len(batches),
            from_rest=request.from_rest,
            by_memory=not bound_by_matmuls(spec.op),
        ).a_part(len(batches))
    except BuildError as error:
        return TrialResult(Outcome.COMPILE, str(error))
    except OutOfResources as error:
        return TrialResult(Outcome.RESOURCES, str(error).splitlines()[0])
    except RuntimeError as error:
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        return _out_of_memory(error)
    outcome = Outcome.SLOW if timing.median_us > request.give_up_us else Outcome.OK
    return TrialResult(outcome, timing=timing, error=found.error)


def _out_of_memory(error: RuntimeError) -> TrialResult:
    """Of a trial that the card has no memory for. Raises MemoryTakenError where others hold what it lacks."""
    import torch

    told = str(error).splitlines()[0]
    if not isinstance(error, torch.OutOfMemoryError):  # the driver's, which tells no sizes
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved() - CONTEXT_BYTES
        if others > 0:
            raise MemoryTakenError(f"{told} (other processes hold {others / 2**30:.1f} GiB of the card)") from error
    elif held_by_others(told):
        raise error
    return TrialResult(Outcome.RESOURCES, f"needs more memory than the card has: {told}")


def time_again(request: Rematch) -> TrialResult:
    """Time trials that passed their checks, in turns, at their shape."""
    from parallax_gen.tuning.workers.measure import time_in_turns

    first = request.trials[0]
    inputs, _ = _inputs_and_oracle(first.spec, first.shape)
    batches = _batches(first, inputs)
    calls = [_call(trial, batches) for trial in request.trials]
    by_memory = not bound_by_matmuls(first.spec.op)
    timings = time_in_turns(calls, timed_ms=request.timed_ms, from_rest=request.from_rest, by_memory=by_memory)
    return TrialResult(Outcome.OK, timings=tuple(timing.a_part(len(batches)) for timing in timings))


def _batches(trial: Trial, inputs: Inputs) -> list[Inputs]:
    """What a trial is timed on: the inputs, and once more with each of the other lengths."""
    import torch

    _, *others = timed_lengths(trial.spec, trial.shape)
    lengths = (torch.tensor(each, dtype=torch.int32, device=inputs.q.device) for each in others)
    return [inputs, *(dataclasses.replace(inputs, cache_seqlens=each) for each in lengths)]


def _call(trial: Trial, batches: list[Inputs]) -> Callable[[], object]:
    """A trial's launch on each of the batches."""
    from parallax_gen.oracle.inputs import softmax_scale

    launch = load(render(trial.spec, trial.config, trial.gpu)).launch
    scale = softmax_scale(trial.spec)
    arguments = [prepare(trial.spec, trial.config, inputs).arguments(scale) for inputs in batches]
    return lambda: [launch(*each) for each in arguments]


def _inputs_and_oracle(spec: KernelSpec, shape: Shape) -> tuple[Inputs, Expected]:
    """Inputs drawn afresh in every child, and what must come out: costly, so once for all configs of a bucket.

    And once for the kernels of a training step that are measured one after the other.
    """
    if op_of(spec).layout is not Layout.TILES:
        return _inputs_and_oracle_of_one(spec, shape)
    step = _training_step(step_of(spec), shape)
    return step.inputs, step.expected(spec)


@lru_cache(maxsize=1)
def _training_step(spec: KernelSpec, shape: Shape) -> TrainingStep:
    from parallax_gen.oracle.verify import TrainingStep

    _inputs_and_oracle_of_one.cache_clear()  # a device's memory is for one of them
    return TrainingStep(spec, shape, seed=random.randrange(2**31), device="cuda")


@lru_cache(maxsize=1)
def _inputs_and_oracle_of_one(spec: KernelSpec, shape: Shape) -> tuple[Inputs, Expected]:
    from parallax_gen.oracle import verify
    from parallax_gen.oracle.inputs import random_inputs_of

    _training_step.cache_clear()
    seed, (lengths, *_) = random.randrange(2**31), timed_lengths(spec, shape)
    inputs = random_inputs_of(spec, shape, seed=seed, device="cuda", full=True, lengths=lengths)
    return inputs, verify.oracle(spec, inputs)


def forget_inputs() -> None:
    """Give back what a device's memory holds for later requests: whoever lacked memory asks again in a while."""
    import torch

    _training_step.cache_clear()
    _inputs_and_oracle_of_one.cache_clear()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # of a device that is lost
            torch.cuda.empty_cache()


def wake_device() -> bool:
    """Make the CUDA context, which takes seconds, while nobody waits for it. Whether there is a device."""
    import torch

    if not torch.cuda.is_available():
        return False
    torch.zeros(1, device="cuda")
    return True


def import_what_gradients_need() -> None:
    """Import, while the first configs compile, what torch would import at its first gradient: sympy, for seconds."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.fx.experimental.symbolic_shapes")


def die_with_parent() -> None:
    """End this process and what it started once its parent is gone, whatever it is in the middle of."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    die_with_parent()
    serve(device="--device" in sys.argv[1:])
