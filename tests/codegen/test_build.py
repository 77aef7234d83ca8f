"""Building kernels: import through the file cache, and ahead-of-time compilation in killable child processes."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import lowering
import platformdirs
import pytest
from strategies import GOLDEN, Kernel, random_kernels

from parallax_gen.codegen.build import compile_for, load, write
from parallax_gen.codegen.render import KernelSource, render
from parallax_gen.errors import BuildError, MachineError, MemoryTakenError
from parallax_gen.files import cache_dir
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.space import default_config, most_shared_bytes, why_invalid
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket, Shape, representative
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.job_run import MAX_SPILLS
from parallax_gen.tuning.workers.messages import Compile, KernelInstance, Reply
from parallax_gen.tuning.workers.worker import Worker

ROOT = Path(__file__).parents[2]
GPU = GPUS["h200"]


def source_of(text: str) -> KernelSource:
    return KernelSource("sample", text, hashlib.sha256(text.encode()).hexdigest())


SAMPLE = source_of("ANSWER = 42  # π\n")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory that does not exist yet, with a temporary directory as the fallback."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    chosen = tmp_path / "made" / "on the way"
    monkeypatch.setenv("PARALLAX_GEN_CACHE_DIR", str(chosen))
    clear_caches()
    yield chosen
    clear_caches()


def clear_caches() -> None:
    cache_dir.cache_clear()
    load.cache_clear()


# -- the cache of files


def test_the_variable_sets_the_cache_directory(cache: Path) -> None:
    path = write(SAMPLE)
    assert path == cache / "kernels" / f"sample_{SAMPLE.sha256[:16]}.py"
    assert path.read_text(encoding="utf-8") == SAMPLE.text
    assert load(SAMPLE).ANSWER == 42


def test_the_default_cache_directory_is_the_users(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARALLAX_GEN_CACHE_DIR")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "user" / name))
    assert write(SAMPLE).parent == tmp_path / "user" / "parallax_gen" / "kernels"


def test_a_file_is_written_atomically_and_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = []
    rename = os.replace

    def watched(old: str, new: Path) -> None:
        renamed.append((Path(old).parent == new.parent, Path(old).read_text(encoding="utf-8"), new.exists()))
        rename(old, new)

    monkeypatch.setattr(os, "replace", watched)
    assert write(SAMPLE) == write(SAMPLE)
    assert renamed == [(True, SAMPLE.text, False)]


def test_different_texts_are_different_modules(cache: Path) -> None:
    other = source_of("ANSWER = 43\n")
    assert (load(SAMPLE).ANSWER, load(other).ANSWER) == (42, 43)
    assert load(SAMPLE) is load(SAMPLE)


@pytest.mark.parametrize("damage", [b"", SAMPLE.text.encode()[:-3], b"\xff\xfe\x00", b"ANSWER = 43\n"])
def test_a_damaged_entry_is_repaired(cache: Path, damage: bytes) -> None:
    write(SAMPLE).write_bytes(damage)
    assert load(SAMPLE).ANSWER == 42
    assert write(SAMPLE).read_text(encoding="utf-8") == SAMPLE.text


def test_a_failed_rename_leaves_no_entry(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(old: str, new: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(MachineError, match="no space left"):
        write(SAMPLE)
    assert list(cache.rglob("*.py")) == []


def below_a_file(folder: Path) -> Path:
    """A directory that cannot be created, even by root."""
    (folder / "file").write_text("", encoding="utf-8")
    return folder / "file" / "cache"


def test_an_unwritable_directory_is_replaced_with_a_warning(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLAX_GEN_CACHE_DIR", str(below_a_file(tmp_path)))
    with pytest.warns(UserWarning, match="cannot write kernels to .*file/cache"):
        path = write(SAMPLE)
    assert path.parents[1] == tmp_path / "tmp" / f"parallax_gen-{os.getuid()}"
    assert path.parents[1].stat().st_mode & 0o077 == 0  # private to the user
    assert load(SAMPLE).ANSWER == 42


def test_another_users_directory_is_not_used(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_GEN_CACHE_DIR", str(below_a_file(tmp_path)))
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(MachineError, match="belongs to another user"):
        write(SAMPLE)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("def launch(:\n", BuildError, "does not import"),
        ("raise ValueError\n", BuildError, "does not import"),
        ("import no_such_module\n", MachineError, "No module named 'no_such_module'"),  # such as triton
    ],
)
def test_a_file_that_does_not_import(cache: Path, text: str, error: type[Exception], message: str) -> None:
    source = source_of(text)
    before = set(sys.modules)
    with pytest.raises(error, match=message):
        load(source)
    assert not [name for name in set(sys.modules) - before if name.startswith("parallax_gen_kernels")]


# -- machine code without a GPU


@pytest.mark.interpreter
def test_the_interpreter_compiles_nothing() -> None:
    kernel = GOLDEN["decode_unsplit"]
    source = render(kernel.spec, kernel.config, GPU)
    with pytest.raises(BuildError, match="TRITON_INTERPRET"):
        compile_for(source, kernel.spec, kernel.config, Shape(1, 1, 1, 1, 100), GPU)


WRONG_THEN_RIGHT = """
import hashlib
from triton.runtime import driver
from strategies import GOLDEN
from parallax_gen.codegen.build import compile_for, load
from parallax_gen.codegen.render import KernelSource, render
from parallax_gen.errors import BuildError
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape

kernel, shape = GOLDEN["decode_unsplit"], Shape(1, 1, 1, 1, 100)
right = render(kernel.spec, kernel.config, GPUS["h200"])
text = right.text.replace("tl.exp2(m - m_new)", "tl.exp2(m - no_such_name)")
assert text != right.text
wrong = KernelSource("wrong", text, hashlib.sha256(text.encode()).hexdigest())
try:
    compile_for(wrong, kernel.spec, kernel.config, shape, GPUS["h200"])
except BuildError as error:
    print("BuildError:", error)
assert "run" not in vars(load(wrong).decode_kernel), "launching is still switched off"
try:
    print("driver left behind:", driver.active)
except RuntimeError:  # none is active, as before
    pass
print(compile_for(right, kernel.spec, kernel.config, shape, GPUS["h200"]))
assert "run" not in vars(load(right).decode_kernel), "launching is still switched off"
"""


def test_a_kernel_that_does_not_compile_is_a_build_error_and_leaves_nothing_behind() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", WRONG_THEN_RIGHT], env=environment, capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    wrong, right = done.stdout.splitlines()
    assert wrong.startswith("BuildError: CompilationError")
    assert right.startswith("Resources(registers=")


@dataclass(frozen=True)
class Job:
    """A named kernel to compile for a GPU at a shape."""

    name: str
    kernel: Kernel
    gpu: str
    shape: Shape

    @property
    def request(self) -> Compile:
        return Compile(KernelInstance(self.kernel.spec, self.kernel.config, self.shape, GPUS[self.gpu]))


GENERATIONS = ("a100", "h200", "b200")
SPILLING, FITTING = "forward_causal_stats for a100", "decode_unsplit for h200"


def shape_of(kernel: Kernel) -> Shape:
    return Shape(2, 2 * kernel.spec.group, 2, 1 if kernel.spec.public_op == "decode" else 1000, 1000)


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    """Two workers: they import torch and Triton once for all tests."""
    with closing(Worker(device=None)) as one, closing(Worker(device=None)) as two:
        yield [one, two]


def replies(jobs: list[Job], workers: list[Worker]) -> dict[str, Reply]:
    """The results of the jobs, compiled by the workers."""
    waiting, found = iter(jobs), {}
    lock = threading.Lock()

    def work(worker: Worker) -> None:
        while True:
            with lock:
                job = next(waiting, None)
            if job is None:
                return
            found[job.name] = worker.ask(job.request, timeout_s=120)

    with ThreadPoolExecutor(len(workers)) as pool:
        for done in [pool.submit(work, worker) for worker in workers]:
            done.result()
    return found


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
def test_kernels_compile_for_every_generation(whole: bool, workers: list[Worker]) -> None:
    """Golden kernels for three GPU generations, random ones for any. Also at sizes of 1, which Triton specialises.

    In the short run every ninth golden kernel is compiled, for one generation, and two at sizes of 1; of the others
    some are lowered in the next test.
    """
    jobs = [
        Job(f"{name} for {gpu}", kernel, gpu, shape_of(kernel))
        for i, (name, kernel) in enumerate(GOLDEN.items())
        for j, gpu in enumerate(GENERATIONS)
        if whole or (i % 9 == 0 and i // 9 % 3 == j) or f"{name} for {gpu}" in (SPILLING, FITTING)
        if why_invalid(kernel.spec, kernel.config, GPUS[gpu]) is None
    ]
    for name, kernel in list(GOLDEN.items())[:: 1 if whole else 36]:
        jobs.append(Job(f"{name}, sizes of 1", kernel, "h200", Shape(1, kernel.spec.group, 1, 1, 1)))
    any_gpu = random.Random(0)
    for kernel in random_kernels(
        20 if whole else 2, GPUS["rtx4090"]
    ):  # the card with the least shared memory, so valid on the others
        if kernel.spec.dtype != "fp32":  # these take up to a minute: kilobytes of spills
            gpu = any_gpu.choice(["a100", "h200", "b200", "rtx4090"])
            jobs.append(Job(f"{kernel} for {gpu}", kernel, gpu, shape_of(kernel)))
    found = replies(jobs, workers)
    for job in jobs:
        reply = found[job.name]
        assert (reply.outcome, reply.detail) == ("ok", ""), job.name
        assert reply.resources is not None
        assert 1 <= reply.resources.registers <= 255, job.name
        gpu = GPUS[job.gpu]
        most = gpu.shared_per_block
        if job.kernel not in GOLDEN.values():  # random kernels are already valid for the card
            most = max(most, most_shared_bytes(job.kernel.spec, job.kernel.config, gpu))
        assert reply.resources.shared_bytes <= most, job.name
        if job.kernel.spec.op != "preprocess":  # preprocess may have one row per warp
            assert reply.resources.shared_bytes > 0, job.name
    # Accumulators, s and t take 192 registers per thread, and an A100's matmul operands are in registers too.
    spilling = found[SPILLING].resources
    assert spilling is not None
    assert spilling.spills > 0
    fitting = found[FITTING].resources
    assert fitting is not None
    assert fitting.spills == 0


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
def test_other_golden_kernels_are_lowered_and_decode_keeps_blocks_in_flight(whole: bool, tmp_path: Path) -> None:
    """Those that the short run above does not compile, for a generation, up to the allocation of shared memory.

    In the short run every third of them.

    Decode for Hopper: if Triton does not pipeline a loop, it loads to registers and uses less shared memory than its
    config says.
    """
    jobs = []
    for i, (name, kernel) in enumerate(GOLDEN.items()):
        decode = kernel.spec.public_op == "decode"
        if i % 9 == 0 and not decode:
            continue
        gpus = [GPUS["h200"]] if decode else [GPUS[name] for name in (*GENERATIONS[i % 3 :], *GENERATIONS)]
        gpu = next(gpu for gpu in gpus if why_invalid(kernel.spec, kernel.config, gpu) is None)
        jobs.append((name, lowering.Job(kernel.spec, kernel.config, gpu, shape_of(kernel))))
    jobs = jobs if whole else jobs[1::3]
    for (name, job), found in zip(jobs, lowering.needs([job for _, job in jobs], tmp_path), strict=True):
        assert found.error == "", name
        assert found.shared_bytes <= job.gpu.shared_per_block, name
        if job.spec.op != "preprocess":  # preprocess may have one row per warp
            assert found.shared_bytes > 0, name
        if isinstance(job.config, DecodeConfig):
            keys_and_values = 2 * job.config.BLOCK_N * job.spec.head_dim * job.spec.cache_bytes
            assert found.shared_bytes >= (job.config.num_stages - 1) * keys_and_values, name


@pytest.mark.parametrize(
    "head_dims", [(224,), pytest.param((112, 160, 192, 256), marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_defaults_of_wide_heads_do_not_spill_kilobytes(head_dims: tuple[int, ...], workers: list[Worker]) -> None:
    """A call without records launches the default. Chunked heads of 224 once spilled 7 KB a thread."""
    jobs = []
    for head_dim in head_dims:
        for op in ("forward", "dkdv", "dqdr"):
            spec = KernelSpec(op, head_dim, "bf16", causal=True, stats=op == "forward")
            shape = representative(Bucket(64, 4096, 4096), 1)
            jobs.append(Job(f"{op} {head_dim}", Kernel(spec, default_config(spec, shape, GPU)), "h200", shape))
    fit_without_many_spills(jobs, workers)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
def test_defaults_of_prefill_chunks_do_not_spill_kilobytes(whole: bool, workers: list[Worker]) -> None:
    """The smaller tiles that are chosen where a larger one does not fit in shared memory."""
    jobs = []
    chunk = KernelSpec("decode_varlen", 256, "bf16", 4, causal=True, multi_token=True)
    kernels = [
        ("rtx4090", replace(chunk, cache_dtype="e4m3")),
        ("h200", replace(chunk, dtype="tf32")),
        ("rtx4090", chunk),
        ("rtx4090", replace(chunk, head_dim=128)),
    ]
    for gpu, spec in kernels if whole else kernels[:2]:
        shape = representative(Bucket(16, 512, 4096), 4)
        jobs.append(Job(f"{spec} for {gpu}", Kernel(spec, default_config(spec, shape, GPUS[gpu])), gpu, shape))
    fit_without_many_spills(jobs, workers)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
def test_defaults_of_synchronous_matmuls_do_not_spill_kilobytes(whole: bool, workers: list[Worker]) -> None:
    """Their operands are in registers, too: with Hopper's tiles these once spilled 4 to 6 KB a thread on an A100."""
    specs = [
        KernelSpec("forward", 128, "bf16", causal=True, stats=True),
        KernelSpec("dkdv", 96, "bf16", causal=True),
        KernelSpec("dkdv", 64, "bf16", causal=True),
        KernelSpec("dqdr", 128, "bf16", 4, causal=True, window=True, varlen=True),
        KernelSpec("dqdr", 192, "bf16", causal=True),
    ]
    jobs = []
    for gpu in ("a100", "rtx4090", "rtx5090") if whole else ("a100",):
        for spec in specs if whole else specs[:2]:
            shape = representative(Bucket(64, 4096, 4096, window=128 if spec.window else 0), spec.group)
            jobs.append(Job(f"{spec} for {gpu}", Kernel(spec, default_config(spec, shape, GPUS[gpu])), gpu, shape))
    fit_without_many_spills(jobs, workers)


def fit_without_many_spills(jobs: list[Job], workers: list[Worker]) -> None:
    found = replies(jobs, workers)
    for job in jobs:
        resources = found[job.name].resources
        assert resources is not None, (job.name, found[job.name])
        assert resources.spills <= MAX_SPILLS, (job.name, resources)
        assert resources.shared_bytes <= GPUS[job.gpu].shared_per_block, (job.name, resources)


def test_a_hanging_child_is_a_timeout_and_a_killed_one_a_machine_fault() -> None:
    kernel = GOLDEN["decode_unsplit"]
    job = Job("", kernel, "h200", shape_of(kernel)).request
    invalid = DecodeConfig(32, 8, 4, "none", 1, 2)
    with closing(Worker(device=None)) as worker:

        def kill() -> None:
            while worker._child is None:
                time.sleep(0.01)
            worker._child.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(MemoryTakenError, match="exit status -9"):  # as the OOM killer does
            worker.ask(job, timeout_s=60)
        killer.join()
        late = worker.ask(job, timeout_s=0.05)
        assert late.outcome == "timeout"
        assert 0.05 <= late.seconds < 60  # includes starting the child
        assert worker.ask(job, timeout_s=60).outcome == "ok"
        refused = worker.ask(Compile(KernelInstance(kernel.spec, invalid, job.instance.shape, GPU)), timeout_s=60)
        assert refused.outcome == "invalid"
        assert "merge 'none' cannot be combined with NUM_SPLITS 4" in refused.detail
        child = worker._child
    assert child is not None
    assert child.poll() is not None  # close() leaves no child
