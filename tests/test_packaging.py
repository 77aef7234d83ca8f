"""Packaging: sdist and wheel contain what git has, and the wheel runs with what it and its extra `tune` declare."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable, Iterable
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_layers import IMPORTS

from parallax_gen.errors import TUNE_EXTRA

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(
    {path.stem for path in (ROOT / "examples").glob("*.py")} - {"convert_model"}
)  # convert_model needs an extra
SHORT = {"train_language_model": "--device cpu --steps 1 --layers 1 --width 32 --head-dim 16 --seqlen 32 --batch 1"}
OPTIONAL_PACKAGES = {"fla", "parallax", "sglang", "vllm"}  # optional: imported if installed
HELP_S = 0.5


def run(*command: object, cwd: Path, **variables: str) -> str:
    """The output of a program that does not see the checkout, and writes only to `cwd`."""
    hidden = ("PYTHONPATH", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"OMP_NUM_THREADS": "1", "PARALLAX_GEN_DB": "tuning.db", "PARALLAX_GEN_CACHE_DIR": "cache"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment | variables, capture_output=True, encoding="utf-8", timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# contents


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    for needed in ("build.__main__", "hatchling.build"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def declared(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """The paths that git tracks or would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return {name for name in listed.split("\0") if (ROOT / name).is_file()}


def test_the_wheel_holds_the_package_and_its_data(wheel: Path, tracked: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}
    package = {name for name in tracked if name.startswith("parallax_gen/")}
    data = {f"parallax_gen/{name}" for name in tracked if name.startswith(("templates/", "tuning_db/"))}
    data |= {name.replace("docs/", "parallax_gen/", 1) for name in tracked if name.startswith("docs/figures/")}
    assert held == package | data
    assert {Path(name).suffix for name in held} >= {".py", ".typed", ".j2", ".css", ".js", ".jsonl", ".sql"}
    assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_the_sdist_holds_what_git_has(dist: Path, tracked: set[str]) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path, encoding="utf-8") as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert held == {name for name in tracked if not name.startswith(".ci/")} | {"PKG-INFO"}
    assert held >= {"LICENSE", "README.md", "CHANGELOG.md", "tests/test_packaging.py"}


def test_what_is_imported_is_declared_and_what_is_needed_is_imported(declared: Message) -> None:
    outside = {name.split(".")[0] for names in IMPORTS.values() for name in names}
    imported = {canonicalize_name(name) for name in outside - sys.stdlib_module_names - {"parallax_gen"}}
    requirements = [Requirement(line) for line in declared.get_all("Requires-Dist", [])]
    assert imported - OPTIONAL_PACKAGES <= {canonicalize_name(requirement.name) for requirement in requirements}
    plain = {canonicalize_name(each.name) for each in requirements if "extra" not in str(each.marker)}
    assert plain == {"jinja2", "platformdirs", "torch", "triton"}
    of_tune = {
        canonicalize_name(each.name) for each in requirements if 'extra == "tune"' in str(each.marker).replace("'", '"')
    }
    assert plain | of_tune <= imported
    assert {canonicalize_name(name) for name in TUNE_EXTRA.values()} | {"markupsafe"} == of_tune


def test_no_version_is_capped_but_transformers(declared: Message) -> None:
    """What is newer than was tested runs, with a warning if it is Triton. transformers changes what we build on."""
    assert declared["Requires-Python"] == ">=3.10"
    requirements = [Requirement(line) for line in declared.get_all("Requires-Dist", [])]
    capped = {each.name for each in requirements if any(part.operator in ("<", "<=", "==") for part in each.specifier)}
    assert capped == {"transformers", "numpy"}  # numpy only for Python 3.10


def test_twine_accepts_both_files(dist: Path) -> None:
    """That an index would take them, and could show the README."""
    pytest.importorskip("twine", reason="twine is not installed: pip install twine")
    files = sorted([*dist.glob("*.whl"), *dist.glob("*.tar.gz")])
    assert run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=dist).count("PASSED") == 2


def test_every_address_in_the_metadata_is_in_the_readme(declared: Message) -> None:
    """No address is guessed: the repository has no public one yet."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    addresses = [line.split(", ")[1] for line in declared.get_all("Project-URL", [])]
    assert addresses
    assert [address for address in addresses if address not in readme] == []


def test_the_citation_is_of_this_version(declared: Message) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: transformers brings it")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}  # what the format requires
    names = ("version", "license", "abstract")
    fields = (declared["Version"], declared["License-Expression"], declared["Summary"])
    assert tuple(citation[name] for name in names) == fields
    assert {each["url"] for each in citation["references"]} == {
        line.split(", ")[1] for line in declared.get_all("Project-URL", []) if line.startswith("Paper, ")
    }


def test_the_newest_release_in_the_changelog_is_this_version_on_the_citation_s_date(declared: Message) -> None:
    """What came since has no version or date: it is under [Unreleased]."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: transformers brings it")
    released = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["date-released"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d[^\]]*)\] - (.+)$", changelog, flags=re.MULTILINE)
    assert versions[0] == (declared["Version"], released.isoformat())


# behaviour


def closure(requirements: Iterable[str], extra: str) -> Iterable[metadata.Distribution]:
    """The installed distributions that the requirements, with those of an extra, pull in, recursively.

    They may ask for extras themselves: torch for those of cuda-toolkit.
    """
    result: dict[tuple[str, frozenset[str]], metadata.Distribution] = {}
    waiting = [(Requirement(line), frozenset({extra})) for line in requirements]
    while waiting:
        package, extras = waiting.pop()
        needed = package.marker is None or any(package.marker.evaluate({"extra": name}) for name in {"", *extras})
        key = (package.name, frozenset(package.extras))
        if needed and key not in result:
            result[key] = metadata.distribution(package.name)
            waiting += [(Requirement(line), key[1]) for line in result[key].requires or []]
    return result.values()


def environment(folder: Path, wheel: Path, declared: Message, extra: str) -> Path:
    """The bin folder of an environment with the wheel and its dependencies with an extra, linked from this one."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in closure(declared.get_all("Requires-Dist", []), extra):
        for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(distribution.locate_file(name))
    python = folder / "bin" / "python"
    # Without an index pip fails if a requirement is missing.
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-index",
        f"{wheel}[{extra}]" if extra else wheel,
        cwd=folder,
    )
    return folder / "bin"


@pytest.fixture(scope="module")
def programs(wheel: Path, declared: Message, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("environment"), wheel, declared, "tune")


@pytest.fixture(scope="module")
def light_programs(wheel: Path, declared: Message, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("light"), wheel, declared, "")


@pytest.fixture
def shell(programs: Path, tmp_path: Path) -> Callable[[str], str]:
    """Runs a shell line in its own folder, with the environment's programs first in PATH."""
    return lambda line: run("sh", "-c", line, cwd=tmp_path, PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")


# Prints where the package is, and which of its modules miss which package.
IMPORT_ALL = """
import importlib, json, pkgutil, parallax_gen
lacking = {}
for module in pkgutil.walk_packages(parallax_gen.__path__, "parallax_gen."):
    try:
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        lacking[module.name] = error.name
print(json.dumps([parallax_gen.__file__, lacking]))
"""

# Prints the imported modules in the last line.
HELP = "import sys; from parallax_gen.cli import main; main(['--help'], standalone_mode=False); print(*sys.modules)"


def test_only_modules_for_an_extra_need_it(programs: Path, shell: Callable[[str], str]) -> None:
    where, lacking = json.loads(shell(f"python -c '{IMPORT_ALL}'"))
    assert Path(where).is_relative_to(programs.parent)
    assert lacking == {
        "parallax_gen.integrations.transformers": "transformers",
        "parallax_gen.integrations.sglang.backend": "sglang",
        "parallax_gen.integrations.sglang.layer": "sglang",
        "parallax_gen.integrations.vllm.backend": "vllm",
        "parallax_gen.integrations.vllm.layer": "vllm",
    }


# Calls each plug-in as its engine does, without the engine.
PLUG_INS = """
from importlib.metadata import entry_points
for group in ("vllm.general_plugins", "sglang.srt.plugins"):
    (plug_in,) = entry_points(group=group, name="parallax_gen")
    print(group, plug_in.load()())
"""


def test_engines_find_their_plug_ins_which_do_nothing_without_them(light_programs: Path, tmp_path: Path) -> None:
    printed = run(light_programs / "python", "-c", PLUG_INS, cwd=tmp_path)
    assert printed == "vllm.general_plugins None\nsglang.srt.plugins None\n"


LIGHT = """
import torch
from parallax_gen import *
from parallax_gen.memory.shipped import load_shipped
q, r, k, v = torch.randn(4, 1, 8, 2, 64)
assert parallax_attn_func(q, r, k, v).shape == q.shape
assert load_shipped("h200")
"""


def test_an_install_without_extras_calls_kernels(
    light_programs: Path, wheel: Path, declared: Message, tmp_path: Path
) -> None:
    installed = {distribution.name for distribution in closure(declared.get_all("Requires-Dist", []), "")}
    assert not {canonicalize_name(name) for name in installed} & {canonicalize_name(n) for n in TUNE_EXTRA.values()}
    run(light_programs / "python", "-c", LIGHT, cwd=tmp_path)
    for command in (["parallax-gen", "--help"], ["python", "-m", "parallax_gen", "list"]):
        program, *arguments = command
        done = subprocess.run(
            [light_programs / program, *arguments], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"error: the command line needs click: pip install '{wheel}[tune]'\n"


def test_help_is_fast(shell: Callable[[str], str]) -> None:
    seconds = []
    for _ in range(3):
        before = os.times()
        assert "tune" in shell("parallax-gen --help")
        after = os.times()
        # CPU time, since wall time depends on the other tests.
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert min(seconds) < HELP_S


def test_help_imports_no_heavy_package(shell: Callable[[str], str]) -> None:
    modules = set(shell(f'python -c "{HELP}"').splitlines()[-1].split())
    assert "click" in modules
    assert not modules & {"torch", "triton", "numpy", "optuna", "sqlite3", "rich"}


def test_both_entry_points_print_the_version(shell: Callable[[str], str], declared: Message) -> None:
    output = shell("parallax-gen --version")
    assert output == shell("python -m parallax_gen --version")
    assert output.split()[-1] == declared["Version"]


def test_doctor_passes_in_the_wheel(shell: Callable[[str], str]) -> None:
    assert re.search(
        r"h200: [1-9]\d* kernels and sizes in your database and the shipped records; configs of calls come from ",
        shell("parallax-gen doctor"),
    )


def test_the_first_command_of_the_readme(shell: Callable[[str], str], tmp_path: Path) -> None:
    """README's first command, with fewer trials and for one sequence at a time."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^pip install -e '\.\[tune\]' && (.*) --trials 8( && .*)$", readme, re.MULTILINE)
    assert command is not None
    shell(f"{command[1]} --trials 1 --max-batch 1{command[2]}")
    assert len(list((tmp_path / "kernels").glob("decode_d128_bf16_*.py"))) > 1


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(shell: Callable[[str], str], tmp_path: Path, example: str) -> None:
    shutil.copy(ROOT / "examples" / f"{example}.py", tmp_path)
    hide = "CUDA_VISIBLE_DEVICES= " if os.environ.get("TRITON_INTERPRET") == "1" else ""  # spares imports of torch
    assert shell(f"{hide}python {example}.py {SHORT.get(example, '')}").strip()
