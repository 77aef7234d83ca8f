"""What to tune when little is said: the usual shapes of each op, and the jobs they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.problem.spec import OPS, KernelSpec
from parallax_gen.tuning.tune import Job

# Forward: a training step, a long prompt, many short sequences and what lies between, each of about as much work.
# Decode: alone and in a batch, over short and long caches; and with four query heads a kv head (GQA).
USUAL_SHAPES: dict[str, tuple[Shape, ...]] = {
    "forward": (
        Shape(4, 16, 16, 4096, 4096),
        Shape(1, 16, 16, 16384, 16384),
        Shape(16, 16, 16, 1024, 1024),
        Shape(8, 16, 16, 2048, 2048),
    ),
    "decode": (
        *(Shape(batch, 8, 8, 1, keys) for batch in (1, 32) for keys in (1024, 4096, 16384)),
        *(Shape(batch, 32, 8, 1, 8192) for batch in (1, 32)),
    ),
}


def worklist(
    gpu: Gpu,
    *,
    ops: Sequence[str] = OPS,
    head_dims: Sequence[int] = (128,),
    dtypes: Sequence[str] = ("bf16",),
    shapes: Mapping[str, Sequence[Shape]] = USUAL_SHAPES,
    causal: bool = True,
    stats: bool = False,
    ragged: bool = False,
) -> list[Job]:
    """Every combination as a job, op by op in the order given; those of the same key once.

    shapes are an op's, and each one's heads are its job's group. causal and stats are of the forward jobs alone,
    ragged of the decode jobs.
    """
    jobs: dict[Job, None] = {}  # a set that keeps the order
    for op in ops:
        flags = {"causal": causal, "stats": stats} if op == "forward" else {"ragged": ragged}
        for head_dim in head_dims:
            for dtype in dtypes:
                for shape in shapes[op]:
                    spec = KernelSpec(op, head_dim, dtype, shape.group, **flags)
                    jobs[Job(spec, bucket_of(shape), gpu)] = None
    return list(jobs)
