"""The environment of every test: its own folders, Triton's interpreter if there is no GPU, hypothesis profiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import pytest
import torch
from gpu_arithmetic import use_in_interpreter
from hypothesis import settings
from interpreter_speed import leave_out_what_has_no_effect
from packaging.version import Version

# Triton reads TRITON_INTERPRET when a kernel is decorated, so it is set before any test imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
ON_A_GPU = os.environ.get("TRITON_INTERPRET") != "1"
# Before 3.7 Triton's interpreter takes arrays of one element for numbers, which numpy refuses since 2.4.
TRITON = Version(version("triton"))  # not imported: its own functions would be decorated before the variable is set
INTERPRETER_FAILS = TRITON < Version("3.7") and Version(np.__version__) >= Version("2.4")

# pytest-xdist's workers have it. Commands in pipes would fold what they print, as on a terminal.
os.environ.pop("COLUMNS", None)

# "ci" draws the same examples in every run: a failure comes from the change, not the draw, and is reproducible.
# "explore" draws new examples: run `pytest --hypothesis-profile=explore` for an hour after the generator changed.
# No deadline: the interpreter's time per case varies a hundredfold.
settings.register_profile("ci", derandomize=True, database=None, deadline=None, max_examples=60, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden", action="store_true", help="write tests/golden/*.py anew instead of comparing with them"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: runs kernels in Triton's CPU interpreter; skipped beside a GPU")
    # The workers and their child processes share the cores. A product of small matrices takes a hundred times as long
    # while the threads of BLAS wait for a core.
    if workers := config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


# Files with tests of up to a minute. They run first: begun last, one would keep a core busy while the others idle.
LONG_FILES = ("test_build.py", "test_docs.py", "test_faulty_compilation.py", "test_packaging.py", "test_storage.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    for item in items:
        if "gpu" in item.keywords and not ON_A_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "interpreter" in item.keywords and ON_A_GPU:
            item.add_marker(pytest.mark.skip(reason="a CUDA device is here: tests/gpu runs the same cases on it"))
        elif "interpreter" in item.keywords and INTERPRETER_FAILS:
            reason = f"the interpreter of Triton {TRITON} needs numpy below 2.4: pip install 'numpy<2.4'"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup() -> None:
    """Seed torch in every test, for the same reason: a bound that one draw in thousands exceeds by rounding fails
    for everyone or for no one."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _session_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put kernels, results and Triton's cache into a folder of this session, for child processes too.

    The workers of pytest-xdist share what Triton compiled: it replaces files atomically. Set TRITON_CACHE_DIR to keep
    it from one session to the next.
    """
    folder = tmp_path_factory.mktemp("home")
    shared = folder if "PYTEST_XDIST_WORKER" not in os.environ else tmp_path_factory.getbasetemp().parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARALLAX_GEN_CACHE_DIR", str(folder / "cache"))
        patch.setenv("PARALLAX_GEN_DB", str(folder / "tuning.db"))
        patch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(shared / "triton")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _fast_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not ON_A_GPU:
            leave_out_what_has_no_effect(patch)
        yield


@pytest.fixture(scope="session")
def gpu_arithmetic() -> Iterator[None]:
    """bf16 and inline assembly in the interpreter, from the first test that uses this to the end of the session."""
    with pytest.MonkeyPatch.context() as patch:
        use_in_interpreter(patch)
        yield
