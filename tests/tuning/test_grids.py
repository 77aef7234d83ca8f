"""The grids of decode shapes: documented size, no duplicates, no shape over the documented limit."""

from __future__ import annotations

from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import bucket_of
from parallax_gen.problem.workloads import GRIDS, PARALLAX_KERNEL, SERVING, Flags
from parallax_gen.tuning.job import grid_jobs


def test_the_grid_of_parallax_kernel_has_216_shapes_minus_those_over_2_gib() -> None:
    assert len(PARALLAX_KERNEL) == len(set(PARALLAX_KERNEL)) == 207
    assert all(shape.batch == shape.group == 1 for _, shape in PARALLAX_KERNEL)
    assert max(2 * shape.heads * shape.seqlen_kv * head_dim for head_dim, shape in PARALLAX_KERNEL) == 2**31


def test_the_serving_grid_fits_a_card_of_80_gb() -> None:
    assert len(SERVING) == len(set(SERVING)) == 4 * 5 * 4
    assert all(shape.group == 4 for _, shape in SERVING)
    assert max(4 * 128 * s.batch * s.kv_heads * s.seqlen_kv for _, s in SERVING) < 40e9


def test_jobs_of_a_grid_are_its_buckets_with_the_given_flags() -> None:
    gpu = gpu_by_name("h200")
    jobs = grid_jobs(gpu, GRIDS["serving"], flags=Flags(page_size=16))
    assert len(jobs) == len({bucket_of(shape) for _, shape in SERVING}) == 44
    assert all(job.spec.page_size == 16 and job.spec.op == "decode_varlen" for job in jobs)
    assert {job.spec.head_dim for job in grid_jobs(gpu, GRIDS["parallax-kernel"], head_dims=(64,))} == {64}
