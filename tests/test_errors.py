"""Which errors are machine faults and which are a config's, by type and text."""

from __future__ import annotations

import errno
import json
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from parallax_gen.errors import (
    BuildError,
    MachineError,
    MemoryTakenError,
    gist,
    held_by_other_processes,
    install_command,
    is_stored_machine_error,
    machine_error,
    machine_error_of_exit,
)

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate {} GiB. GPU 0 has a total capacity of 79.11 GiB of which {} GiB is free. "
    "Including non-PyTorch memory, this process has 40.90 GiB memory in use. Of the allocated memory {} GiB is "
    "allocated by PyTorch, and 45.32 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
    "large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
WITH_OTHERS = OUT_OF_MEMORY.format("20.00", "4.19", "40.00")  # other processes use 34 GiB
ALONE = OUT_OF_MEMORY.format("20.00", "4.19", "74.00")
FAR_TOO_MUCH = OUT_OF_MEMORY.format("90.00", "4.19", "40.00")

MEMORY: list[BaseException] = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),  # from fork
    RuntimeError("can't start new thread"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),  # from memory that torch maps itself
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError(WITH_OTHERS),
    RuntimeError("PTXAS error: `ptxas` failed with error code -9\n`ptxas` stderr:\n\nRepro command: ptxas x.ptx"),
]
MACHINE: list[BaseException] = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EMFILE, "Too many open files"),
    PermissionError(errno.EACCES, "Permission denied", "/cache"),
    NotADirectoryError(errno.ENOTDIR, "Not a directory", "/file/cache"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "/opt/ptxas"),
    OSError(errno.ENOEXEC, "Exec format error", "/opt/ptxas"),
    subprocess.CalledProcessError(127, ["/opt/ptxas", "--version"]),
    ModuleNotFoundError("No module named 'redis'"),
    RuntimeError("Cannot find ptxas-blackwell"),
    RuntimeError(
        "PTXAS error: `ptxas` failed with error code 255\n`ptxas` stderr:\n"
        "ptxas /tmp/x.ptx, line 5; fatal   : Unsupported .version 8.8; current version is '8.4'\nRepro command: ptxas"
    ),
    RuntimeError(
        "PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\n"
        "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'\nRepro command: ptxas"
    ),
    RuntimeError("PTXAS error: `ptxas` failed with error code 127\n`ptxas` stderr:\n"),
    RuntimeError("PTXAS error: `ptxas` failed with error code -7\n`ptxas` stderr:\n"),  # a full in-memory file system
    RuntimeError("PTXAS error: `ptxas` failed with error code -25\n`ptxas` stderr:\n"),  # a limit on file size
    RuntimeError("database or disk is full"),
    RuntimeError("Failed to initialize NVML: Driver/library version mismatch"),
    RuntimeError("CUDA_ERROR_ECC_UNCORRECTABLE"),
    RuntimeError("CUDA error: MPS client failed to connect to the MPS control daemon"),
    RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be"),
    RuntimeError("CUDA error: no CUDA-capable device is detected"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: unknown error"),
    RuntimeError("No CUDA GPUs are available"),
    RuntimeError("0 active drivers ([]). There should only be one."),
]
CONFIGS: list[BaseException] = [
    RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: misaligned address"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    RuntimeError("PassManager::run failed"),
    RuntimeError(
        "PTXAS error: `ptxas` failed with error code 255\n`ptxas` stderr:\n"
        "ptxas error   : Entry function 'k' uses too much shared data (0x40000 bytes, 0x38c00 max)\nRepro command: x"
    ),
    RuntimeError("PTXAS error: `ptxas` raised SIGSEGV"),
    RuntimeError(ALONE),
    RuntimeError(FAR_TOO_MUCH),
    ValueError("cannot make tensors of so many elements"),
    BuildError("nothing was compiled"),
]


@pytest.mark.parametrize("error", MEMORY, ids=repr)
def test_memory_taken_by_other_processes(error: BaseException) -> None:
    assert type(machine_error(error)) is MemoryTakenError


@pytest.mark.parametrize("error", MACHINE, ids=repr)
def test_faults_of_the_machine(error: BaseException) -> None:
    result = machine_error(error)
    assert type(result) is MachineError
    assert str(result).startswith(gist(error))
    assert len(str(result).splitlines()) == 1


@pytest.mark.parametrize("error", CONFIGS, ids=repr)
def test_faults_of_a_config(error: BaseException) -> None:
    assert machine_error(error) is None


def test_the_cause_of_an_error_counts_but_not_its_context() -> None:
    wrapped = BuildError("at 3:4")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(machine_error(wrapped), MachineError)
    handled = BuildError("at 3:4")
    handled.__context__ = FileNotFoundError("a cache that has it not yet")
    assert machine_error(handled) is None
    fault = MachineError("as a child said")
    assert machine_error(fault) is fault


def test_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "TRITON_CACHE_DIR" in str(machine_error(OSError(errno.ENOSPC, "No space left on device")))
    assert "ulimit -n" in str(machine_error(OSError(errno.EMFILE, "Too many open files")))
    assert "--workers" in str(machine_error(MemoryError()))
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    assert "(TRITON_PTXAS_PATH is set to this path)" in str(machine_error(PermissionError(errno.EACCES, "denied", "")))
    fatal = str(machine_error(MACHINE[10]))
    assert "Unsupported .version 8.8" in fatal  # and not just that ptxas failed


@pytest.mark.parametrize(
    ("status", "last_line", "kind"),
    [
        (-9, "no message", MemoryTakenError),
        (-15, "no message", MachineError),
        (-2, "KeyboardInterrupt", MachineError),
        (-11, "Segmentation fault", None),
        (-6, "LLVM ERROR: Cannot select: intrinsic", None),
        (1, "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.", None),
        (1, "OSError: [Errno 28] No space left on device", MachineError),
    ],
)
def test_exit_statuses_of_child_processes(status: int, last_line: str, kind: type[MachineError] | None) -> None:
    result = machine_error_of_exit(status, last_line)
    assert (None if result is None else type(result)) is kind


def test_messages_stored_by_earlier_versions() -> None:
    """A summary, a child's last output or a message's first line."""
    for error in [*MEMORY[:5], *MEMORY[-1:], *MACHINE[:10], *MACHINE[12:]]:
        assert is_stored_machine_error(gist(error)), error
    for error in CONFIGS:
        assert not is_stored_machine_error(gist(error)), error
        assert not is_stored_machine_error(f"exit status 1: {gist(error)}"), error
    assert is_stored_machine_error("cannot write the kernel /cache/x.py: [Errno 28] No space left on device")
    assert is_stored_machine_error("Triton's cuobjdump is missing: /triton/bin/cuobjdump")
    assert is_stored_machine_error("exit status -9: no message")
    assert is_stored_machine_error("exit status 1: ImportError: libcudart.so.12: cannot open shared object file")
    assert is_stored_machine_error(WITH_OTHERS)
    assert not is_stored_machine_error(ALONE)
    assert not is_stored_machine_error(f"needs more memory than the card has: {MEMORY[5]}")
    assert not is_stored_machine_error("exit status -11: no message")
    assert not is_stored_machine_error("no answer in 120 s")
    assert not is_stored_machine_error("")


def test_an_out_of_memory_message_without_sizes_is_the_configs() -> None:
    assert held_by_other_processes(WITH_OTHERS)
    assert not held_by_other_processes("CUDA out of memory.")


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'parallax-gen[tune]'"),  # from an index, which has the package
        ({"url": "file:///home/a%20b/gen", "dir_info": {"editable": True}}, "pip install -e '/home/a b/gen[tune]'"),
        ({"url": "file:///home/gen", "dir_info": {}}, "pip install '/home/gen[tune]'"),
        ({"url": "file:///home/gen.whl", "archive_info": {}}, "pip install '/home/gen.whl[tune]'"),
        (
            {"url": "https://host/gen.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}},
            "pip install 'parallax-gen[tune] @ git+https://host/gen.git@0a1b'",
        ),
        (
            {"url": "https://host/gen.whl", "archive_info": {}},
            "pip install 'parallax-gen[tune] @ https://host/gen.whl'",
        ),
    ],
)
def test_an_extra_is_installed_from_where_the_package_is_from(
    origin: dict[str, object] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip writes direct_url.json, by PEP 610, unless it took the package from an index."""
    (tmp_path / "METADATA").write_text("Name: parallax-gen\n", encoding="utf-8")
    if origin is not None:
        (tmp_path / "direct_url.json").write_text(json.dumps(origin), encoding="utf-8")
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(tmp_path))
    assert install_command("tune") == command


def test_without_an_installation_it_is_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert install_command("tune") == f"pip install -e '{Path(__file__).parents[1]}[tune]'"
