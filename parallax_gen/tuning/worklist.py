"""The jobs that a tune has to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.tuning.job import Job
from parallax_gen.tuning.usual import NO_FLAGS, TRAINING, USUAL_HEAD_DIM, Flags, kernels, usual

# Everything: inference, then training.
ALL_WORK = ("forward", "decode", TRAINING)


def worklist(
    gpu: Gpu,
    *,
    ops: Sequence[str] = ALL_WORK,
    head_dims: Sequence[int] = (),
    dtypes: Sequence[str] = ("bf16",),
    shapes: Mapping[str, Sequence[Shape]] | None = None,
    flags: Flags = NO_FLAGS,
) -> list[Job]:
    """Every combination as a job, op by op in the order given; those of the same key once.

    ops        of OPS, or TRAINING for the four kernels of a training step
    head_dims  by default 128 of the shapes given, else the usual ones
    shapes     an op's, by default the usual ones; each one's heads are its jobs' group
    flags      each goes to the ops that have it
    """
    jobs: dict[Job, None] = {}  # a set that keeps the order
    for op in ops:
        if shapes is None:
            sizes = usual(op, tuple(head_dims))
        else:
            sizes = {head_dim: tuple(shapes[op]) for head_dim in head_dims or (USUAL_HEAD_DIM,)}
        for head_dim, its_shapes in sizes.items():
            for dtype in dtypes:
                for shape in its_shapes:
                    for spec, seen in kernels(op, head_dim, dtype, shape, flags):
                        jobs[Job(spec, bucket_of(seen), gpu)] = None
    return list(jobs)


def of_grid(
    gpu: Gpu,
    grid: Sequence[tuple[int, Shape]],
    head_dims: Sequence[int] = (),
    dtypes: Sequence[str] = ("bf16",),
    flags: Flags = NO_FLAGS,
) -> list[Job]:
    """A grid's decode jobs, those of the same key once; of some of its head_dims, if given."""
    jobs: dict[Job, None] = {}
    for head_dim, shape in grid:
        for dtype in dtypes:
            if not head_dims or head_dim in head_dims:
                ((spec, seen),) = kernels("decode", head_dim, dtype, shape, flags)
                jobs[Job(spec, bucket_of(seen), gpu)] = None
    return list(jobs)
