"""Every code block of the pages runs in a temporary folder, as a reader would run it, or says why it does not.

A comment on the line before a block's fence says how the test differs from a reader's run:

    <!-- needs: gpu -->       run beside a GPU only; its syntax is checked everywhere
    <!-- stands in: NAME -->  code of STAND_INS runs first, or replaces a part of the block
    <!-- not run: REASON -->  a reason in NOT_RUN; its commands are still parsed
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from parallax_gen.cli import main
from parallax_gen.codegen.render import text_hash_of
from parallax_gen.memory.place import Place
from parallax_gen.memory.shipped import load_shipped, shipped_gpus
from parallax_gen.problem.hardware import GPUS
from parallax_gen.report.published import published

TOP = Path(__file__).parents[1]
PAGES = sorted([TOP / "README.md", TOP / "CONTRIBUTING.md", *(TOP / "docs").glob("*.md")])
ON_A_GPU = os.environ.get("TRITON_INTERPRET") != "1"
NEEDS = {"convert_and_finetune": "transformers", "hub": "kernels"}  # pages

NOT_RUN = (
    "it installs",
    "it takes minutes",
    "it takes hours",
    "it needs a server",
    "it needs several GPUs",
    "it writes to the checkout",
    "test_packaging.py runs it",
)

# Python that runs before a block, in the page's namespace.
STAND_INS = {
    # Threads of gloo that still run when Python exits may abort it.
    "one rank": "import atexit, torch, torch.distributed as dist\natexit.register(dist.destroy_process_group)\n"
    + "dist.init_process_group('nccl' if torch.cuda.is_available() else 'gloo',\n"
    + "    init_method='file://' + __file__ + '.ranks', rank=0, world_size=1)\n",
    "Triton's interpreter": "import os, torch\n"
    + "if not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'",
    # from_pretrained looks for a folder with the model's name before it uses the network.
    "a tiny random model of that name": "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
    + "Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,\n"
    + "    num_attention_heads=4, num_key_value_heads=2, head_dim=16)).save_pretrained('Qwen/Qwen3-0.6B')",
    "a training step": "import torch\nfrom parallax_gen import parallax_attn_func\n"
    + "def train_step(): parallax_attn_func(*torch.randn(4, 1, 16, 2, 64))",
    "one trial a job": "",  # see `steps_of`
}

# Runs a page's blocks from top to bottom like a notebook, with one namespace for Python.
DRIVER = """
import json, subprocess, sys
page, steps = json.load(sys.stdin)
namespace = {"__name__": "__main__", "__file__": page}
for language, line, code in steps:
    if language == "python":
        exec(compile("\\n" * line + code, page, "exec"), namespace)
    else:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], stdin=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(f"{page}, line {line}: exit status {done.returncode}")
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: the line number of its fence (from 1), and the marker before it, ("", "") for none."""

    page: Path
    line: int
    language: str
    code: str
    marker: tuple[str, str]

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(TOP)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in ("python", "sh") and self.marker[0] != "not run" and (ON_A_GPU or not self.needs_gpu)

    @property
    def needs_gpu(self) -> bool:
        return self.marker == ("needs", "gpu")


def blocks_of(page: Path) -> list[Block]:
    result, lines = [], page.read_text(encoding="utf-8").splitlines()
    opened: int | None = None
    for n, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if opened is None:
            opened = n
            continue
        marker = re.fullmatch(r"<!-- ([a-z ]+): (.+) -->", lines[opened - 1])
        code = "\n".join(lines[opened + 1 : n]) + "\n"
        pair = (marker[1], marker[2]) if marker else ("", "")
        result.append(Block(page, opened + 1, lines[opened].lstrip()[3:].strip(), code, pair))
        opened = None
    assert opened is None, f"{page.name}, line {opened}: a block without an end"
    return result


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def ids(value: object) -> str:
    return value.where if isinstance(value, Block) else str(Path(str(value)).relative_to(TOP))


def steps_of(page: Path) -> list[tuple[str, int, str]]:
    """The code of a page that runs: language, line and code, including stand-ins."""
    steps = []
    for block in blocks_of(page):
        if not block.runs:
            continue
        code = block.code
        if block.marker[0] == "stands in":
            if block.marker[1] == "one trial a job":
                code = re.sub(r"trials([ =])\d+", r"trials\g<1>1", code)
            else:
                steps.append(("python", 0, STAND_INS[block.marker[1]]))
        if block.language == "sh":
            code = without_installing(code)
            code = code if block.needs_gpu else f"export CUDA_VISIBLE_DEVICES=\n{code}"
        steps.append((block.language, block.line, code))
    return steps


def without_installing(code: str) -> str:
    """Remove `pip install X &&` from lines; what they install is checked separately."""
    return re.sub(r"^pip install .*?(&& |$)", "", code, flags=re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if steps_of(page)], ids=ids)
def test_a_page_runs(page: Path, tmp_path: Path) -> None:
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    programs, folder = tmp_path / "programs", tmp_path / "here"
    for path in (programs, folder):
        path.mkdir()
    for name, runs in (("python", ""), ("parallax-gen", "-m parallax_gen.cli")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {runs} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    shutil.copytree(TOP / "tuning_db", folder / "tuning_db")
    (folder / "tests").symlink_to(TOP / "tests")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(TOP)}
    environment |= {"PARALLAX_GEN_DB": str(tmp_path / "tuning.db"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {} if ON_A_GPU else {"CUDA_VISIBLE_DEVICES": ""}  # spares children an import of torch
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([str(folder / page.name), steps_of(page)]),
        env=environment,
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, f"{page.name}:\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_fence_and_marker_is_parsed(page: Path) -> None:
    """A marker that is not on the line before a fence would have no effect."""
    text = page.read_text(encoding="utf-8")
    assert "~~~" not in text
    assert text.count("<!--") == sum(block.marker != ("", "") for block in blocks_of(page))


def test_every_stand_in_is_used() -> None:
    assert {block.marker[1] for block in BLOCKS if block.marker[0] == "stands in"} == set(STAND_INS)


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
def test_a_block_that_does_not_run_is_valid(block: Block) -> None:
    kind, value = block.marker
    assert block.language in ("python", "sh", "text"), "of no known language"
    known = {"": ("",), "needs": ("gpu",), "stands in": tuple(STAND_INS), "not run": NOT_RUN}
    assert value in known.get(kind, ()), f"no such marker: {kind}: {value}"
    if block.language == "python":
        assert kind != "not run"
        compile(block.code, block.where, "exec")
    elif block.language == "sh":
        subprocess.run(["bash", "-n", "-c", block.code], check=True, timeout=20)
        for command in commands_of(block.code) if kind == "not run" else ():
            check(command)
    if block.needs_gpu and not ON_A_GPU:
        pytest.skip("needs a CUDA device: its syntax alone was checked")


def commands_of(code: str) -> list[list[str]]:
    """The commands of shell code as lists of words, without pipes and redirections."""
    code = code.replace("\\\n", " ")
    lines = [line for line in code.splitlines() if line and not line.startswith("#")]
    parts = [part for line in lines for part in re.split(r"&&|\|\||[|;]", line)]
    return [shlex.split(re.sub(r"\d?>.*", "", part), comments=True) for part in parts if part.strip()]


def check(words: list[str]) -> None:
    """Check that a command is valid: its options, its extras, its files."""
    while "=" in words[0]:  # environment variables of this command
        words = words[1:]
    if words[0] == "parallax-gen":
        parse(words[1:])
    elif words[:2] == ["pip", "install"]:
        for extras in re.findall(r"\[(.+)\]", " ".join(words)):
            assert set(extras.split(",")) <= extras_of_the_package(), words
    elif words[0] in ("python", "torchrun", "compute-sanitizer") or words[0].endswith(".py"):
        files = [word for word in words if re.match(r"(examples|tests)/", word)]
        assert all((TOP / file).exists() for file in files), words
    else:
        assert words[0] in ("bash", "cat", "cd", "cp", "diff", "export", "git", "ls", "mypy", "ruff", "source"), words


def extras_of_the_package() -> set[str]:
    text = (TOP / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE))


def parse(words: list[str]) -> None:
    """Parse a command without running it. Click raises its usage errors."""
    command, words = command_of(words)
    command.make_context(command.name, words)


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The (sub)command that the words begin with, and the words after its name."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and re.fullmatch(r"-v|[a-z]+", words[0]):
        name, *words = words
        if name != "-v":
            result = command.get_command(click.Context(command), name)
            assert result is not None, f"no command {name!r}"
            command = result
    return command, words


@pytest.mark.parametrize("page", [*PAGES, TOP / "CHANGELOG.md"], ids=ids)
def test_commands_named_in_text_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for command_line in re.findall(r"`parallax-gen ([^`]+)`", text):
        command, words = command_of(command_line.split())
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= options | {"--help"}, command_line


@pytest.mark.parametrize("page", [*PAGES, TOP / "templates" / "README.md"], ids=ids)
def test_links_have_targets_in_docs(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        result = (page.parent / path).resolve() if path else page
        assert result.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", result.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


SCREENS = [block for page in PAGES for block in blocks_of(page) if block.code.startswith("$ parallax-gen ")]


@pytest.mark.parametrize("block", SCREENS, ids=lambda block: block.where)
def test_a_screen_is_what_a_command_prints(block: Block) -> None:
    """Its lines without numbers are, but for the tiers: times, configs, counts and tiers change with the Triton."""
    command, *lines = block.code.splitlines()
    assert max(map(len, lines)) <= 80
    arguments = shlex.split(command.removeprefix("$ parallax-gen "))
    done = subprocess.run(
        [sys.executable, "-m", "parallax_gen.cli", *arguments],
        cwd=TOP,
        env=os.environ | {"COLUMNS": "80", "PYTHONPATH": str(TOP)},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    printed = [without_tiers(line) for line in done.stdout.splitlines()]
    assert [line for line in lines if not re.search(r"\d", line) and without_tiers(line) not in printed] == []


def without_tiers(line: str) -> list[str]:
    """The words of a line without the names of tiers, of which a table has a column for each that some place has."""
    return [word for word in line.split() if word not in ("here", "toolchain", "sibling", "near", "default")]


def test_every_page_is_linked_from_the_readme() -> None:
    text = (TOP / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name != "README.md" and f"{page.name})" not in text] == []


def test_generated_pages_are_up_to_date(tmp_path: Path) -> None:
    """`python docs/generate.py` writes them. Spaces and line ends do not count: click's folding may change."""
    command = [sys.executable, TOP / "docs" / "generate.py", tmp_path]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(TOP)}, check=True, timeout=60)
    pages = list(tmp_path.iterdir())
    assert {page.name for page in pages} == {"README.md", "cli.md", "figures.md", "release.md", "speedup.svg"}
    for page in pages:
        folder = TOP if page.name == "README.md" else TOP / "docs"
        written = (folder / page.name).read_text(encoding="utf-8")
        assert written.split() == page.read_text(encoding="utf-8").split(), "run python docs/generate.py"


def test_every_csv_of_figures_is_on_the_page() -> None:
    folder = TOP / "docs" / "figures"
    used = re.findall(r"^\{\{(\w+)\}\}$", (folder / "page.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(used) == sorted(path.stem for path in folder.glob("*.csv"))


def test_the_readme_has_the_figures_of_the_chart_and_of_decode() -> None:
    text = (TOP / "README.md").read_text(encoding="utf-8")
    panels = (TOP / "docs" / "speedup.svg").read_text(encoding="utf-8").split("Decode, one query")
    training, decode = (re.findall(r">(\d\.\d\d)<", panel) for panel in panels)
    assert f"Training steps: {min(training)} to {max(training)}." in text
    assert f"query heads over 8 kv heads: {min(decode)} to {max(decode)}." in text
    (cutedsl,) = (p.ratio for p in published(["h200"]) if p.baseline == "parallax-kernel CuTeDSL")
    assert f"Over {cutedsl.shapes} shapes of decode theirs take {cutedsl.mean:.2f} times as long" in text
    assert f"in the geometric mean, {cutedsl.least:.2f} at least." in text


def test_the_configuration_page_names_every_variable() -> None:
    files = (TOP / "parallax_gen").rglob("*.py")
    named = {name for file in files for name in re.findall(r"\bPARALLAX_GEN_[A-Z_]+", file.read_text(encoding="utf-8"))}
    text = (TOP / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert {name for name in named if f"`{name}`" not in text} == set()


def test_the_readme_counts_the_shipped_records() -> None:
    """The support matrix has, by card and Triton, the number of kernels and sizes with records of today's kernels."""
    text = (TOP / "README.md").read_text(encoding="utf-8")
    _, *versions = cells(text, "card")
    for name in shipped_gpus():
        row = cells(text, f"{name.upper()} SXM")
        places: dict[str, set[Place]] = {}
        for record in load_shipped(name):
            if text_hash_of(record.place.spec, record.config, GPUS[name]) == record.evidence.text:
                version = ".".join(record.evidence.triton.split(".")[:2])
                places.setdefault(f"Triton {version}", set()).add(record.place)
        counts = {version: f"measured: {len(of)}" for version, of in places.items()}
        assert {v: cell for v, cell in zip(versions, row[1:], strict=True) if cell.startswith("measured")} == counts


def test_the_readme_has_every_card_once() -> None:
    text = (TOP / "README.md").read_text(encoding="utf-8")
    table = "| card |" + text.partition("\n| card |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    named = {card: row for row in rows for card in row[0].split(", ")}
    assert sum(len(row[0].split(", ")) for row in rows) == len(named) == len(GPUS)
    for gpu in GPUS.values():
        _, capability, *statuses = named[gpu.title.removeprefix("NVIDIA ").replace("GeForce ", "")]
        if gpu.is_amd:
            assert capability == gpu.gfx
            assert statuses == ["compiled", "compiled", "untested"]
            continue
        assert capability == ".".join(map(str, gpu.capability))
        words = {status.split(":")[0].split(",")[0] for status in statuses}
        assert words <= ({"measured", "borrowed"} if capability == "9.0" else {"compiled"})
        assert ("not by 3.5" in statuses[-1]) == (gpu.name in ("b300", "gb10"))


def cells(text: str, first: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_chained_commands_are_split() -> None:
    install, test = (block for block in blocks_of(TOP / "README.md") if block.code.startswith("pip install"))
    assert all(block.code.count("\n") == 1 for block in (install, test))
    assert [words[0] for words in commands_of(install.code)] == ["pip", "parallax-gen", "parallax-gen"]
    assert [words[:3] for words in commands_of(test.code)] == [["pip", "install", "-e"], ["python", "-m", "pytest"]]
