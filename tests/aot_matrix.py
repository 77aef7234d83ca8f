"""The defaults of all ops, compiled ahead of time for every architecture in the table of GPUs: what fits, what spills.

    python tests/aot_matrix.py [--capability sm_80]... [--kind dkdv]... [--dtype bf16]... [--jobs 2] [--all]

It prints a table of the capabilities, then the kernels that do not fit, do not compile, or spill much. The cards of a
capability have the same limits and run the same machine code, so that a config that several of them have by default is
compiled once. All of it takes hours; `tests/ops/test_defaults_fit.py` lowers the same kernels, which is faster but does
not show spills.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from lowering import Job

from parallax_gen.codegen.render import render, text_hash_of
from parallax_gen.codegen.resources import Resources
from parallax_gen.errors import BuildError
from parallax_gen.ops.space import default_config
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.shapes import Bucket, representative
from parallax_gen.problem.spec import KernelSpec

# One card of each architecture, for its limits.
CARDS: dict[str, Gpu] = {
    gpu.target: gpu for gpu in sorted(GPUS.values(), key=lambda gpu: (gpu.is_amd, gpu.capability, gpu.gfx))
}
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = ("bf16", "fp16", "tf32")
MANY_SPILLS = 200  # bytes per thread; dispatch's guard lets a borrowed kernel spill 128 more than the default

# One batch that fills a card, and one that does not.
TRAINED = (Bucket(64, 4096, 4096), Bucket(1, 128, 1024))
DECODED = (Bucket(256, 1, 4096), Bucket(8, 1, 16384))
PREFILLED = (Bucket(64, 512, 4096), Bucket(8, 128, 1024))

BUCKETS = {
    **dict.fromkeys(("forward", "forward stats", "preprocess", "dkdv", "dqdr"), TRAINED),
    "decode": DECODED,
    "decode own lengths": DECODED,
    "decode multi-token": PREFILLED,
}


def decode_layouts(head_dim: int, dtype: str, many: bool) -> Iterator[KernelSpec]:
    """decode_varlen with one query or several a sequence, in every cache layout."""
    dense = KernelSpec("decode_varlen", head_dim, dtype, 4, causal=many, multi_token=many)
    yield dense
    yield replace(dense, group=71)
    yield replace(dense, page_size=16)
    yield replace(dense, page_size=256)
    yield replace(dense, leftpad=True)
    yield replace(dense, window=True, causal=True)
    yield replace(dense, stats=True)
    if many:
        yield replace(dense, group=1, causal=False)
        yield replace(dense, varlen=True, page_size=16)
    if dtype != "tf32":
        yield replace(dense, cache_dtype="e4m3")
        yield replace(dense, cache_dtype="e5m2", page_size=16)


def specs_of(kind: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """The specs of a kind of kernel at a head_dim and dtype."""
    if kind == "preprocess":
        return [KernelSpec("preprocess", head_dim, "fp32" if dtype == "tf32" else dtype)]
    if kind == "decode":
        return [KernelSpec("decode", head_dim, dtype, group) for group in (1, 16, 71)]
    if kind.startswith("decode "):
        return list(decode_layouts(head_dim, dtype, many=kind == "decode multi-token"))
    spec = KernelSpec(kind.split()[0], head_dim, dtype, causal=True, stats=kind == "forward stats")
    return [spec, replace(spec, group=4, window=True, varlen=True), replace(spec, causal=False)]


def jobs_of(kind: str, capability: str, dtypes: Sequence[str] = DTYPES) -> list[Job]:
    """The distinct defaults of a kind of kernel on the cards of a capability, such as "sm_90", or "gfx942"."""
    jobs: dict[object, Job] = {}
    for head_dim in HEAD_DIMS:
        for dtype in dtypes:
            for spec in specs_of(kind, head_dim, dtype):
                for bucket in BUCKETS[kind]:
                    shape = representative(replace(bucket, window=128 if spec.window else 0), spec.group)
                    for gpu in GPUS.values():
                        if gpu.target == capability:
                            runs = spec if gpu.has_tf32 or spec.dtype != "tf32" else replace(spec, dtype="fp32")
                            config = default_config(runs, shape, gpu)
                            jobs.setdefault((runs, config), Job(runs, config, gpu, shape))
    return list(jobs.values())


# -- the command


@dataclass(frozen=True)
class Row:
    """What became of a job. resources: None if it does not compile, and then `error` says why."""

    job: Job
    resources: Resources | None
    error: str = ""

    @property
    def over(self) -> bool:
        return self.resources is not None and self.resources.shared_bytes > self.job.gpu.shared_per_block

    @property
    def spills(self) -> int:
        return self.resources.spills if self.resources else 0

    def __str__(self) -> str:
        return f"{self.job.gpu.target}: {self.job.spec}: {self.job.config}: {self.resources or self.error}"


def compiled(job: Job) -> Row:
    """Runs in a child process."""
    from parallax_gen.codegen.build import compile_for

    try:
        return Row(job, compile_for(render(job.spec, job.config, job.gpu), job.spec, job.config, job.shape, job.gpu))
    except BuildError as error:
        return Row(job, None, str(error))


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """Without those whose kernels have the same text: their configs differ in what `launch` alone uses."""
    return list({text_hash_of(job.spec, job.config, job.gpu): job for job in jobs}.values())


def table(rows: dict[str, list[Row]]) -> str:
    """Counts by capability, in Markdown."""
    lines = [["capability", "kernels", "over shared memory", "not compiled", "some spills", "over 200 bytes", "most"]]
    lines += [["---"] * len(lines[0])]
    for capability, found in rows.items():
        spills = [row.spills for row in found]
        counts = [len(found), sum(row.over for row in found), sum(bool(row.error) for row in found)]
        counts += [sum(n > 0 for n in spills), sum(n > MANY_SPILLS for n in spills), max(spills)]
        lines.append([capability, *map(str, counts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--capability", action="append", choices=CARDS, help="default: all")
    arguments.add_argument("--kind", action="append", choices=BUCKETS, help="default: all")
    arguments.add_argument("--dtype", action="append", choices=DTYPES, help="default: all")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels that compile at the same time")
    arguments.add_argument("--all", action="store_true", help="print every kernel, not only the bad ones")
    given = arguments.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(given.jobs) as pool:
        os.environ |= {"TRITON_CACHE_DIR": f"{folder}/triton", "PARALLAX_GEN_CACHE_DIR": f"{folder}/kernels"}
        for capability in given.capability or CARDS:
            for kind in given.kind or BUCKETS:
                jobs = distinct(jobs_of(kind, capability, given.dtype or DTYPES))
                for row in pool.map(compiled, jobs):
                    rows.setdefault(capability, []).append(row)
                    if given.all or row.error or row.over or row.spills > MANY_SPILLS:
                        print(row, flush=True)
    print(table(rows))
    sys.exit(any(row.over or row.error for found in rows.values() for row in found))


if __name__ == "__main__":
    main()
