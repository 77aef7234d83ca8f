"""The child's side of tuning/worker.py: compiles without a device, checks and times with one, dies alone."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import sys
import time
from functools import lru_cache
from typing import TYPE_CHECKING

from parallax_gen.codegen.build import compile_for, load
from parallax_gen.codegen.calling import Inputs, prepare
from parallax_gen.codegen.render import render
from parallax_gen.errors import BuildError, ConfigError
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.worker import Compile, Measure, Outcome

if TYPE_CHECKING:
    from parallax_gen.tuning.verify import Expected


def serve() -> None:
    """Answer requests until there are no more. An error that is no outcome ends the child: its parent sees a crash."""
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with the replies
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:  # the parent is done, or gone
            return
        start = time.monotonic()
        outcome = compile_trial(request) if isinstance(request, Compile) else measure_trial(request)
        pickle.dump(dataclasses.replace(outcome, seconds=time.monotonic() - start), replies)
        replies.flush()


def compile_trial(request: Compile) -> Outcome:
    """Compile for the trial's GPU. Needs no device."""
    trial = request.trial
    try:
        source = render(trial.spec, trial.config, trial.gpu)
        resources = compile_for(source, trial.spec, trial.config, trial.shape, trial.gpu)
    except ConfigError as error:
        return Outcome("invalid", str(error))
    except BuildError as error:
        return Outcome("compile", str(error))
    return Outcome("ok", resources=resources)


def measure_trial(request: Measure) -> Outcome:
    """Check at an awkward shape and at the trial's own, then time at the trial's own."""
    import torch
    from triton.runtime.errors import OutOfResources

    from parallax_gen.tuning import verify
    from parallax_gen.tuning.measure import time_call

    trial = request.trial
    spec, config, shape = trial.spec, trial.config, trial.shape
    try:
        source = render(spec, config, trial.gpu)
        small = verify.awkward_shape(spec, config, shape.kv_heads)
        found = verify.check(source, spec, config, small, seed=random.randrange(2**31), device="cuda")
        if found.wrong:
            return Outcome("wrong", f"at {small}: {found.wrong}", error=found.error)
        inputs, expected = _inputs_and_oracle(spec, shape)
        found = verify.run(source, spec, config, inputs, expected)
        if found.wrong:
            return Outcome("wrong", f"at {shape}: {found.wrong}", error=found.error)
        launch = load(source).launch
        arguments = prepare(spec, config, inputs).arguments(verify.softmax_scale(spec))
        timing = time_call(
            lambda: launch(*arguments),
            timed_ms=request.timed_ms,
            give_up_us=request.give_up_us,
            from_rest=request.from_rest,
        )
    except BuildError as error:
        return Outcome("compile", str(error))
    except (OutOfResources, torch.cuda.OutOfMemoryError) as error:
        return Outcome("resources", str(error).splitlines()[0])
    kind = "slow" if timing.median_us > request.give_up_us else "ok"
    return Outcome(kind, timing=timing, error=found.error)


@lru_cache(maxsize=1)
def _inputs_and_oracle(spec: KernelSpec, shape: Shape) -> tuple[Inputs, Expected]:
    """Inputs drawn afresh in every child, and what must come out: costly, so once for all configs of a bucket."""
    from parallax_gen.tuning import verify

    inputs = verify.random_inputs_of(spec, shape, seed=random.randrange(2**31), device="cuda", full=True)
    return inputs, verify.oracle(spec, inputs)


def wake_device() -> None:
    """Make the CUDA context, which takes seconds, while nobody waits for it."""
    import torch

    torch.cuda.init()
    torch.zeros(1, device="cuda")


if __name__ == "__main__":
    if "--device" in sys.argv[1:]:
        wake_device()
    serve()
