"""A user without HOME and passwd entry, as in containers: calls work, commands say which variable to set."""

from __future__ import annotations

import os
import pwd
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from parallax_gen.cli import main
from parallax_gen.codegen.build import ensure_triton_cache, load, triton_cache
from parallax_gen.codegen.render import KernelSource
from parallax_gen.errors import MachineError, StoreError
from parallax_gen.files import cache_dir, user_path
from parallax_gen.memory.store import default_path
from parallax_gen.runtime.dispatch import RuntimeMemory

VARIABLES = ("HOME", "PARALLAX_GEN_DB", "PARALLAX_GEN_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME")
CACHED = (cache_dir, ensure_triton_cache, load)


@pytest.fixture(autouse=True)
def _clear_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def fallback(tmp_path: Path) -> Path:
    return tmp_path / "tmp" / f"parallax_gen-{os.getuid()}"


def no_passwd_entry(uid: int) -> pwd.struct_passwd:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_passwd_entry)


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("message", [None, "~/there"])
def test_calls_work_without_a_home(message: str | None, fallback: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if message is not None:
        monkeypatch.setenv("PARALLAX_GEN_DB", message)
        monkeypatch.setenv("PARALLAX_GEN_CACHE_DIR", message)
    with pytest.warns(UserWarning, match=r"no home folder.*set PARALLAX_GEN_DB .*Only shipped records"):
        assert RuntimeMemory().store is None
    with pytest.warns(UserWarning, match=r"no home folder.*set PARALLAX_GEN_CACHE_DIR .*using"):
        assert cache_dir() == fallback
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once per process
        assert load(KernelSource("sample", "ANSWER = 42\n", 16 * "0")).ANSWER == 42


@pytest.mark.usefixtures("no_home")
def test_commands_without_a_home_name_the_variable_to_set() -> None:
    for arguments in (["list"], ["db", "path"], ["db", "stats"], ["db", "prune", "--failures"]):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 1
        assert done.stderr.count("\n") == 1
        assert "set PARALLAX_GEN_DB to an absolute path" in done.stderr
        assert "Traceback" not in done.stderr
    with pytest.raises(StoreError, match="no home folder"):
        default_path()


@pytest.mark.parametrize("home", ["", "/nowhere/at/all", "file"])
def test_an_unwritable_home(home: str, tmp_path: Path, fallback: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / home) if home != "/nowhere/at/all" else "/proc/nowhere")
    with pytest.warns(UserWarning, match="cannot write kernels to"):
        assert cache_dir() == fallback
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        RuntimeMemory().close()  # a missing database counts as empty


def test_paths_from_the_environment_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PARALLAX_GEN_CACHE_DIR", "~/kernels of mine")
    monkeypatch.setenv("PARALLAX_GEN_DB", "~/mine.db")
    assert cache_dir() == tmp_path / "kernels of mine"
    assert default_path() == tmp_path / "mine.db"
    monkeypatch.setenv("PARALLAX_GEN_DB", "~nobody-of-this-name/mine.db")
    with pytest.raises(MachineError, match=r"no home folder for ~nobody-of-this-name/mine.db: set PARALLAX_GEN_DB"):
        user_path("PARALLAX_GEN_DB", str)


def test_a_cache_subfolder_of_another_user(tmp_path: Path, fallback: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache folder is writable, but not the subfolder in it; here that is a file."""
    (tmp_path / "kernels").write_text("", encoding="utf-8")
    monkeypatch.setenv("PARALLAX_GEN_CACHE_DIR", str(tmp_path))
    with pytest.warns(UserWarning, match="cannot write kernels"):
        assert cache_dir() == fallback


def test_without_any_writable_folder_the_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("PARALLAX_GEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="nor to a temporary folder"):
        cache_dir()


@pytest.fixture
def not_interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this process compiles kernels instead of interpreting them."""
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)


@pytest.mark.usefixtures("not_interpreting")
def test_triton_gets_a_cache_if_its_own_is_unwritable(
    tmp_path: Path, fallback: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    ensure_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    ensure_triton_cache.cache_clear()
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "triton"))
    with pytest.warns(UserWarning, match="Triton cannot keep its programs"):
        ensure_triton_cache()
    assert triton.knobs.cache.dir == str(fallback / "triton")


@pytest.mark.usefixtures("not_interpreting", "no_home")
def test_triton_gets_a_cache_if_there_is_no_home(fallback: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.cache, "home_dir", "~/")  # Triton reads it once, at import
    monkeypatch.setenv("TRITON_CACHE_DIR", "to be put back")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    with pytest.raises(MachineError, match="set TRITON_CACHE_DIR"):
        triton_cache()
    with pytest.warns(UserWarning, match="no home folder: set TRITON_CACHE_DIR"):
        ensure_triton_cache()
    assert triton.knobs.cache.dir == str(fallback / "triton")
