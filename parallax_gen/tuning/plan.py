"""The tune of a whole model: its steps, the jobs for their kernels, how long these take, and what they gained."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from parallax_gen.describe import duration
from parallax_gen.errors import ArgumentError
from parallax_gen.memory.guard import CheckedChoice, checked_choice
from parallax_gen.memory.lock import Lock
from parallax_gen.memory.place import Place, place_of
from parallax_gen.memory.ranking import RecordSource, comparable, comparable_default, default_of
from parallax_gen.memory.result import Result
from parallax_gen.ops.base import KernelConfig, config_to_dict
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.models import Model, model_of
from parallax_gen.problem.steps import Call, Step
from parallax_gen.problem.work import bound_us
from parallax_gen.tuning.job import Job, Progress, weakest_first

FINALS_S = 1.0  # after a job's time budget: its fastest configs are timed again
REFRESH_S = 5.0  # a refresh of one place


def read_model(path: Path, argument: str = "--model") -> Model:
    """The model in a folder of transformers, or of its config.json. Raises ArgumentError, which names the file."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        got = error if path.exists() else f"{path}, which is not on this machine"  # such as a name on the Hub
        raise ArgumentError(argument, got, "a folder with a config.json, or that file") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise ArgumentError(argument, f"{file}, which is not JSON ({error})", "a config.json") from error
    if not isinstance(config, dict):
        raise ArgumentError(argument, f"{file}, which has no fields", "a config.json")
    return model_of(config, str(file), file.resolve().parent.name)


@dataclass(frozen=True)
class Plan:
    """Steps on a card, and the kernel that a call of each place gets now.

    model  or the title of other steps
    """

    model: Model | str
    steps: Sequence[Step]
    gpu: Gpu
    choices: Mapping[Place, CheckedChoice]

    def place(self, call: Call) -> Place:
        return place_of(self.gpu.name, call.spec, call.shape)

    def bound_us(self, call: Call) -> float:
        """The roofline bound of a launch at the place's sizes, with the cache lengths that its time is of."""
        job = Job.of(call.spec, call.shape, self.gpu)
        return bound_us(job.spec, job.timed_shape, self.gpu)

    @cached_property
    def jobs(self) -> list[Job]:
        """One job for each place, those with the weakest evidence first: a tune that is stopped has gained the most."""
        return weakest_first({place: choice.candidate.tier for place, choice in self.choices.items()}, self.gpu)

    @property
    def tiers(self) -> Counter[str]:
        """How many kernels have their config from each tier."""
        return Counter(choice.candidate.source for choice in self.choices.values())

    def most_seconds(self, budget_s: float, devices: int) -> float:
        """How long the jobs take at most, if each uses its whole time budget."""
        return math.ceil(len(self.jobs) / devices) * (budget_s + FINALS_S)


def plan_of(
    model: Model | str, steps: Sequence[Step], gpu: Gpu, memory: RecordSource, lock: Lock | None = None
) -> Plan:
    """The plan for steps on a card. Raises LockError if the lock refuses one of their kernels."""
    places = {place_of(gpu.name, call.spec, call.shape): None for step in steps for call in step.calls}
    return Plan(model, steps, gpu, {place: checked_choice(place, gpu, memory, lock=lock) for place in places})


class TimeLeft:
    """Estimates how long the remaining jobs take: each as long as those that ended, at first its whole budget."""

    def __init__(self, jobs: int, budget_s: float, devices: int = 1):
        self.jobs, self._budget_s, self._devices = jobs, budget_s, devices
        self.begun = 0
        self._durations: list[float] = []

    @property
    def ended(self) -> int:
        return len(self._durations)

    def begin(self) -> None:
        self.begun += 1

    def end(self, seconds: float) -> None:
        self._durations.append(seconds)

    def seconds(self, of_running: Sequence[float] = ()) -> float:
        """of_running: at most how long each running job still takes."""
        each = sum(self._durations) / self.ended if self._durations else self._budget_s
        running = sum(min(left, each) for left in of_running)
        return ((self.jobs - self.begun) * each + running) / self._devices

    def text(self, of_running: Sequence[float] = ()) -> str:
        """`3 of 13 jobs done, about 7 min left`."""
        return f"{self.ended} of {self.jobs} jobs done, about {duration(self.seconds(of_running))} left"


# -- Times of a step's kernels, and of their defaults.


@dataclass(frozen=True)
class CallTimes:
    """The config of a kernel, and the times of one launch with it and with the default; None for an unknown time.

    Times are those of the place's bucket, which stands for the call's sizes.
    note      where the config comes from, or how its trials ended
    bound_us  the least time that the card's peak rates allow, at the place's sizes and the timed lengths
    """

    call: Call
    config: KernelConfig | None
    time_us: float | None
    default_us: float | None
    note: str
    bound_us: float

    @property
    def gain(self) -> float | None:
        """The default's time divided by the config's."""
        return self.default_us / self.time_us if self.default_us and self.time_us else None


@dataclass(frozen=True)
class StepTimes:
    """The times of a step's kernels. Its sums are None if a time is unknown."""

    step: Step
    lines: list[CallTimes]

    @property
    def count(self) -> int:
        return sum(line.call.count for line in self.lines)

    @property
    def time_us(self) -> float | None:
        return self._sum([line.time_us for line in self.lines])

    @property
    def default_us(self) -> float | None:
        return self._sum([line.default_us for line in self.lines])

    @property
    def bound_us(self) -> float:
        return sum(line.bound_us * line.call.count for line in self.lines)

    @property
    def gain(self) -> float | None:
        return self.default_us / self.time_us if self.default_us and self.time_us else None

    def _sum(self, times: list[float | None]) -> float | None:
        known = [time * line.call.count for time, line in zip(times, self.lines, strict=True) if time is not None]
        return sum(known) if len(known) == len(times) else None

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step.name,
            "sizes": self.step.detail,
            "kernels": [
                {
                    "spec": line.call.spec.to_dict(),
                    "shape": line.call.shape.to_dict(),
                    "calls": line.call.count,
                    "config": config_to_dict(line.config) if line.config else None,
                    "from": line.note,
                    "time_us": line.time_us,
                    "default_us": line.default_us,
                    "bound_us": line.bound_us,
                    "gain": line.gain,
                }
                for line in self.lines
            ],
            "time_us": self.time_us,
            "default_us": self.default_us,
            "bound_us": self.bound_us,
            "gain": self.gain,
        }


def times_after_tune(plan: Plan, done: Sequence[Progress], memory: RecordSource) -> list[StepTimes]:
    """The best config of each job: measured, or predicted without a device."""
    best = {progress.job.place: progress.best for progress in done}

    def times(call: Call) -> CallTimes:
        result = best.get(plan.place(call))
        if result is None:
            return CallTimes(call, None, None, None, "no config worked", plan.bound_us(call))
        default_us = _default_us(result, plan.gpu, memory)
        return CallTimes(call, result.config, result.time_us, default_us, result.outcome.value, plan.bound_us(call))

    return _times(plan, times)


def times_of_choices(plan: Plan, memory: RecordSource) -> list[StepTimes]:
    """The config that each call gets now, with the time of its record: on this card, or on the one it is borrowed from.

    A default without a measurement has no time.
    """

    def times(call: Call) -> CallTimes:
        candidate = plan.choices[plan.place(call)].candidate
        record = candidate.record
        time_us = record.time_us if record else None
        default_us = _default_us(record, GPUS.get(record.place.gpu, plan.gpu), memory) if record else None
        return CallTimes(call, candidate.config, time_us, default_us, candidate.source, plan.bound_us(call))

    return _times(plan, times)


def _times(plan: Plan, times: Callable[[Call], CallTimes]) -> list[StepTimes]:
    return [StepTimes(step, [times(call) for call in step.calls]) for step in plan.steps]


def _default_us(result: Result, gpu: Gpu, memory: RecordSource) -> float | None:
    """The default's time at a result's place that its time may be compared with; None if it is unknown."""
    default = default_of(result.place, gpu)
    if result.config == default:
        return result.time_us
    if result.measured:
        known = comparable_default(result, default, gpu, memory)
    else:
        predicted = (r for r in memory.results(result.place) if r.config == default and r.outcome is result.outcome)
        known = next((r for r in predicted if comparable(r.evidence, result.evidence)), None)
    return known.time_us if known else None
