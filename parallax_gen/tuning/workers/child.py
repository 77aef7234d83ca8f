"""The child process of tuning/workers/worker.py: compiles without a device, checks and times with one."""

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
    held_by_other_processes,
    machine_error,
)
from parallax_gen.memory.result import Outcome
from parallax_gen.ops.base import OpKind, op_of
from parallax_gen.ops.space import timed_lengths
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import bound_by_matmuls
from parallax_gen.tuning.job import step_spec
from parallax_gen.tuning.workers.messages import (
    Compile,
    Identify,
    Inspect,
    KernelInstance,
    Measure,
    MeasureInterleaved,
    Ready,
    Reply,
    WorkerRequest,
)

if TYPE_CHECKING:
    from parallax_gen.oracle.verify import Expected, TrainingStep


def serve(*, device: bool) -> None:
    """Report that this child is ready, then answer requests until there are no more.

    A fault of the machine is sent as a reply, which the parent raises. Any other error that is not an outcome ends the
    child, which the parent reports as a crash.
    """
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of libraries must not mix with the replies

    def reply(compute: Callable[[], object]) -> None:
        try:
            message = compute()
        except MAYBE_MACHINE_ERRORS as error:
            fault = machine_error(error)
            if fault is None:
                raise
            if isinstance(fault, MemoryTakenError):
                free_cached_inputs()
            message = fault
        pickle.dump(message, replies)
        replies.flush()

    reply(lambda: Ready(create_context() if device else False))
    if device:
        Thread(target=import_sympy, daemon=True).start()
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:  # the parent is done, or gone
            return
        reply(partial(answer, request))


def answer(request: WorkerRequest | Identify | Inspect) -> Reply | Gpu | int | None:
    """The reply to a request. Raises an error that `machine_error` recognises if the machine is at fault."""
    start = time.monotonic()
    if isinstance(request, Identify):
        return None if hides_all_devices() else gpu_here(0)
    if isinstance(request, Inspect):
        return taken_bytes()
    if isinstance(request, Compile):
        reply = compile_instance(request)
    elif isinstance(request, Measure):
        reply = measure_instance(request)
    else:
        reply = measure_interleaved(request)
    return dataclasses.replace(reply, seconds=time.monotonic() - start)


def compile_instance(request: Compile) -> Reply:
    """Compile an instance for its GPU. Needs no device."""
    instance = request.instance
    try:
        source = render(instance.spec, instance.config, instance.gpu)
        resources = compile_for(source, instance.spec, instance.config, instance.shape, instance.gpu)
    except ConfigError as error:
        return Reply(Outcome.INVALID, str(error))
    except BuildError as error:
        return Reply(Outcome.COMPILE, str(error))
    return Reply(Outcome.OK, resources=resources)


def measure_instance(request: Measure) -> Reply:
    """Check an instance at a small shape, which no tile divides, and at its own shape; then time it at its own."""
    from triton.runtime.errors import OutOfResources

    from parallax_gen.oracle import verify
    from parallax_gen.tuning.workers.measure import time_call

    instance = request.instance
    spec, config, shape = instance.spec, instance.config, instance.shape
    try:
        source = render(spec, config, instance.gpu)
        small = op_of(spec).awkward_shape(spec, config, shape.kv_heads)
        verdict = verify.check(source, spec, config, small, seed=random.randrange(2**31), device="cuda")
        if verdict.wrong:
            return Reply(Outcome.WRONG, f"at {small}: {verdict.wrong}", error=verdict.error)
        inputs, expected = _inputs_and_oracle(spec, shape)
        verdict = verify.launch_and_check(source, spec, config, inputs, expected)
        if verdict.wrong:
            return Reply(Outcome.WRONG, f"at {shape}: {verdict.wrong}", error=verdict.error)
        timed_inputs = _timed_inputs(instance, inputs)
        timing = time_call(
            _call(instance, timed_inputs),
            timed_ms=request.timed_ms,
            give_up_us=request.give_up_us * len(timed_inputs),
            in_bursts=request.in_bursts,
            memory_bound=not bound_by_matmuls(spec.op),
        ).per_launch(len(timed_inputs))
    except BuildError as error:
        return Reply(Outcome.COMPILE, str(error))
    except OutOfResources as error:
        return Reply(Outcome.RESOURCES, str(error).splitlines()[0])
    except RuntimeError as error:
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        return _out_of_memory(error)
    outcome = Outcome.SLOW if timing.median_us > request.give_up_us else Outcome.OK
    return Reply(outcome, timing=timing, error=verdict.error)


def _out_of_memory(error: RuntimeError) -> Reply:
    """The result of a trial that ran out of GPU memory. Raises MemoryTakenError if other processes hold the memory."""
    import torch

    message = str(error).splitlines()[0]
    if not isinstance(error, torch.OutOfMemoryError):  # raised by the driver, without sizes
        held_bytes = taken_bytes() - CONTEXT_BYTES
        if held_bytes > 0:
            raise MemoryTakenError(
                f"{message} (other processes hold {held_bytes / 2**30:.1f} GiB of the card)"
            ) from error
    elif held_by_other_processes(message):
        raise error
    return Reply(Outcome.RESOURCES, f"needs more memory than the card has: {message}")


def taken_bytes() -> int:
    """How much of the device's memory other processes and this one's CUDA context take; not what torch takes here."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def measure_interleaved(request: MeasureInterleaved) -> Reply:
    """Time interleaved trials, which passed their checks, at their shape."""
    from parallax_gen.tuning.workers.measure import time_interleaved

    first = request.instances[0]
    inputs, _ = _inputs_and_oracle(first.spec, first.shape)
    timed_inputs = _timed_inputs(first, inputs)
    calls = [_call(instance, timed_inputs) for instance in request.instances]
    memory_bound = not bound_by_matmuls(first.spec.op)
    timings = time_interleaved(calls, timed_ms=request.timed_ms, in_bursts=request.in_bursts, memory_bound=memory_bound)
    return Reply(Outcome.OK, timings=tuple(timing.per_launch(len(timed_inputs)) for timing in timings))


def _timed_inputs(instance: KernelInstance, inputs: Inputs) -> list[Inputs]:
    """The inputs that an instance is timed on: `inputs`, and copies with each of the other sequence lengths."""
    import torch

    _, *other_lengths = timed_lengths(instance.spec, instance.shape)
    tensors = (torch.tensor(lengths, dtype=torch.int32, device=inputs.q.device) for lengths in other_lengths)
    return [inputs, *(dataclasses.replace(inputs, cache_seqlens=lengths) for lengths in tensors)]


def _call(instance: KernelInstance, timed_inputs: list[Inputs]) -> Callable[[], object]:
    """A call that launches an instance's kernel on each of the timed inputs."""
    from parallax_gen.oracle.inputs import softmax_scale

    launch = load(render(instance.spec, instance.config, instance.gpu)).launch
    scale = softmax_scale(instance.spec)
    launches = [prepare(instance.spec, instance.config, inputs).arguments(scale) for inputs in timed_inputs]
    return lambda: [launch(*arguments) for arguments in launches]


def _inputs_and_oracle(spec: KernelSpec, shape: Shape) -> tuple[Inputs, Expected]:
    """Random inputs, and the oracle's outputs. The costly oracle runs once for all configs of a bucket.

    It runs only once for kernels of a training step that are measured one after the other.
    """
    if op_of(spec).kind is not OpKind.TILES:
        return _inputs_and_oracle_of_kernel(spec, shape)
    step = _training_step(step_spec(spec), shape)
    return step.inputs, step.expected(spec)


@lru_cache(maxsize=1)
def _training_step(spec: KernelSpec, shape: Shape) -> TrainingStep:
    from parallax_gen.oracle.verify import TrainingStep

    _inputs_and_oracle_of_kernel.cache_clear()  # the device's memory has room for one of the two caches
    return TrainingStep(spec, shape, seed=random.randrange(2**31), device="cuda")


@lru_cache(maxsize=1)
def _inputs_and_oracle_of_kernel(spec: KernelSpec, shape: Shape) -> tuple[Inputs, Expected]:
    from parallax_gen.oracle import verify
    from parallax_gen.oracle.inputs import random_inputs_of

    _training_step.cache_clear()
    seed, (lengths, *_) = random.randrange(2**31), timed_lengths(spec, shape)
    inputs = random_inputs_of(spec, shape, seed=seed, device="cuda", full=True, lengths=lengths)
    return inputs, verify.oracle(spec, inputs)


def free_cached_inputs() -> None:
    """Free the cached inputs on the device. The request that ran out of memory is sent again later."""
    import torch

    _training_step.cache_clear()
    _inputs_and_oracle_of_kernel.cache_clear()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # the device is lost
            torch.cuda.empty_cache()


def hides_all_devices() -> bool:
    """Whether CUDA_VISIBLE_DEVICES is empty. torch would find no device, but its import takes seconds."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") == ""


def create_context() -> bool:
    """Create the CUDA context before the first request, because it takes seconds. Returns whether there is a device."""
    import torch

    if not torch.cuda.is_available():
        return False
    torch.zeros(1, device="cuda")
    return True


def import_sympy() -> None:
    """Import sympy while the first configs compile: torch imports it at its first gradient, which takes seconds."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.fx.experimental.symbolic_shapes")


def die_with_parent() -> None:
    """End this process and its children once its parent is gone, whatever they are doing."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    die_with_parent()
    serve(device="--device" in sys.argv[1:] and not hides_all_devices())
