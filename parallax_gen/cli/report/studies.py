"""What is known, study by study: one kernel in one bucket on one GPU, and what was tried of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from parallax_gen.cli.known import Origins, differences, shape_of, unlike_here
from parallax_gen.cli.options import gpu_named
from parallax_gen.cli.text import rate
from parallax_gen.errors import UnknownGpuError
from parallax_gen.memory.keys import Key
from parallax_gen.memory.results import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket, Shape, work_of
from parallax_gen.problem.spec import OPS, KernelSpec
from parallax_gen.tuning.worklist import worklist

# How a bucket stands, the best first.
STATES = ("measured", "elsewhere", "predicted", "failed", "untuned")

Place = tuple[str, KernelSpec, Bucket]  # a GPU by name, a kernel, a bucket


@dataclass(frozen=True)
class Study:
    """One kernel in one bucket on one GPU in one environment.

    gpu      what is known of the card; None for one that is neither in the table nor in this machine
    results  the measured from fast to slow, then the predicted, then the failed
    trials   those of them that are the user's own, in the order in which they were first tried
    unlike   what keeps them from being used in this environment, for people; empty where nothing does
    known_as the first result in one word: measured (by the user), shipped, predicted, or how it failed
    """

    key: Key
    gpu: Gpu | None
    results: tuple[Result, ...]
    trials: tuple[Result, ...]
    unlike: tuple[str, ...]
    known_as: str

    @property
    def place(self) -> Place:
        return self.key.gpu, self.key.spec, self.key.bucket

    @property
    def best(self) -> Result | None:
        return self.results[0] if self.results[0].measured else None

    @property
    def state(self) -> str:
        """One of STATES: "elsewhere" was measured in another environment, and is not used in this one."""
        if self.best is not None:
            return "elsewhere" if self.unlike else "measured"
        return "predicted" if self.results[0].outcome == "predicted" else "failed"

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(result.outcome for result in self.results)

    @property
    def newest(self) -> str:
        return max(result.created_at for result in self.results)

    @property
    def rate(self) -> float | None:
        """Of the best, as `cli.text.rate_unit` counts it."""
        time_us = self.best and self.best.time_us
        return rate(self.key.spec, shape_of(self.results[0]), time_us) if time_us else None

    @property
    def share(self) -> float | None:
        """Of the roofline's bound that the best reaches, from 0 to 1; None where the card's peaks are not known."""
        if self.best is None or self.best.time_us is None or self.gpu is None:
            return None
        return bound_us(self.key.spec, shape_of(self.best), self.gpu) / self.best.time_us


def bound_us(spec: KernelSpec, shape: Shape, gpu: Gpu) -> float:
    """Microseconds that a call takes at the least: its work at the card's peak, or its bytes at its bandwidth."""
    work = work_of(spec, shape)
    return 1e6 * max(work.flops / gpu.peak(spec.dtype), work.bytes / gpu.bandwidth)


def card_named(name: str) -> Gpu | None:
    """The GPU that records go by, if it is in the table or in this machine."""
    try:
        return gpu_named(name)
    except UnknownGpuError:
        return None


def studies_of(memory: Memory, results: Iterable[Result]) -> list[Study]:
    """The studies that results of a memory are of; the results, and so the studies, are sorted by key."""
    origins = Origins(memory)
    trials: dict[Key, list[Result]] = {}
    for trial in memory.store.in_order() if memory.store else ():
        trials.setdefault(trial.key, []).append(trial)
    card = cache(card_named)
    found = []
    for key, group in groupby(results, key=lambda r: r.key):
        alike = tuple(group)
        found.append(
            Study(
                key=key,
                gpu=card(key.gpu),
                results=alike,
                trials=tuple(trials.get(key, ())),
                unlike=tuple(differences(unlike_here(key))),
                known_as=origins.status(alike[0]),
            )
        )
    return found


def of_most_use(studies: Iterable[Study]) -> list[Study]:
    """Of each place its study in this environment; where nothing was measured in it, beside it the best elsewhere.

    The best elsewhere is the newest that was measured, else the newest.
    """
    found: list[Study] = []
    for _, group in groupby(studies, key=lambda study: study.place):  # sorted by key: a place's studies come together
        alike = list(group)
        here = [study for study in alike if not study.unlike]
        others = sorted((s for s in alike if s.unlike), key=lambda s: (s.best is not None, s.newest))
        found += here
        if others and not any(study.best for study in here):
            found.append(others[-1])
    return found


def standing(studies: Iterable[Study], gpus: Sequence[str]) -> dict[Place, Study | None]:
    """Every place that could be tuned, op by op, with the study that says most about it, None where there is none.

    Those are what `parallax-gen tune` tunes when it is asked for nothing in particular, and what was tried on any of
    the GPUs.
    """
    best: dict[Place, Study | None] = {}
    tried: dict[tuple[KernelSpec, Bucket], None] = {}
    for study in studies:
        tried[study.key.spec, study.key.bucket] = None
        known = best.get(study.place)
        if known is None or _weight(study) > _weight(known):
            best[study.place] = study
    for gpu in gpus:
        card = card_named(gpu)
        usual = [(job.spec, job.bucket) for job in worklist(card)] if card else []
        for spec, bucket in (*usual, *tried):
            best.setdefault((gpu, spec, bucket), None)
    return dict(sorted(best.items(), key=lambda item: _order(item[0])))


def _weight(study: Study) -> tuple[int, str]:
    """How much a study says of its place; of those that say as much the newer counts."""
    return -STATES.index(study.state), study.newest


def _order(place: Place) -> tuple[object, ...]:
    gpu, spec, bucket = place
    return OPS.index(spec.op), gpu, *order_of(spec), bucket.kv_rows, bucket.seqlen_q, bucket.seqlen_kv, bucket.window


def order_of(spec: KernelSpec) -> tuple[object, ...]:
    """Sorts kernels of an op as people would."""
    return spec.head_dim, spec.dtype, spec.group, str(spec)
