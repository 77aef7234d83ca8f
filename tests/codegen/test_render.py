"""The text of rendered kernels: golden files, and rules for every kernel.

tests/golden has whole kernels, NAME.py. A kernel that is much like a whole one of its op is stored as the difference
from it, NAME.diff, with one line of context. After an intended change of a template, write them anew and read in the
diff what the change does:

    python -m pytest tests/codegen/test_render.py tests/codegen/test_fingerprint.py --regenerate-golden
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import jinja2
import pytest
from strategies import GOLDEN, Kernel, random_kernels

from parallax_gen.codegen import render as render_module
from parallax_gen.codegen.fingerprint import fingerprint
from parallax_gen.codegen.render import render
from parallax_gen.errors import ConfigError
from parallax_gen.files import data_dir
from parallax_gen.ops.base import op_of
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.spec import OPS, KernelSpec

GPU = GPUS["h200"]
TESTS = Path(__file__).parents[1]
RANDOM_KERNELS = 150


def text_of(kernel: Kernel) -> str:
    return render(kernel.spec, kernel.config, GPU).text


EVERY_TEXT = {**GOLDEN, **{f"random_{i}": kernel for i, kernel in enumerate(random_kernels(RANDOM_KERNELS, GPU))}}


@cache
def golden_files() -> dict[str, tuple[Path, str]]:
    """The file and the expected content of each golden kernel.

    The first kernel of an op is stored whole, each other one as its difference from the nearest before it.
    """
    files, before = {}, defaultdict[str, list[str]](list)
    for name, kernel in GOLDEN.items():
        others = before[kernel.spec.op]
        difference = min((difference_of(base, name) for base in others), key=len, default=None)
        if difference is None:
            files[name] = (TESTS / "golden" / f"{name}.py", text_of(kernel))
        else:
            files[name] = (TESTS / "golden" / f"{name}.diff", "".join(f"{line}\n" for line in difference))
        others.append(name)
    return files


def difference_of(base: str, name: str) -> list[str]:
    """The lines of a golden kernel's difference from another.

    Without line numbers, so that a new line in both does not change the file.
    """
    texts = (text_of(GOLDEN[each]).splitlines() for each in (base, name))
    lines = difflib.unified_diff(*texts, base, name, "", "", 1, "")
    return ["@@" if line.startswith("@@") else line for line in lines]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, request: pytest.FixtureRequest) -> None:
    path, expected = golden_files()[name]
    if request.config.getoption("--regenerate-golden"):
        path.with_suffix({".py": ".diff", ".diff": ".py"}[path.suffix]).unlink(missing_ok=True)
        path.write_text(expected, encoding="utf-8")
    assert expected == path.read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    files = {path.name for path in (TESTS / "golden").iterdir()} - {"fingerprints.json"}
    assert files == {path.name for path, _ in golden_files().values()}


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed: pip install parallax-gen[lint]")
def test_rendered_kernels_pass_ruff(tmp_path: Path) -> None:
    for name, kernel in EVERY_TEXT.items():
        (tmp_path / f"{name}.py").write_text(text_of(kernel), encoding="utf-8")
    ours = ["--config", str(TESTS.parent / "pyproject.toml")]
    for arguments in (["check", *ours], ["check", "--isolated"], ["format", "--check", *ours]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "--no-cache", str(tmp_path)],
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, f"ruff {' '.join(arguments)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.mark.parametrize("name", EVERY_TEXT)
def test_rendered_kernels_have_no_dead_code(name: str) -> None:
    text = text_of(EVERY_TEXT[name])
    for mark in ("{{", "}}", "{%", "%}", "{#", "#}"):
        assert mark not in text
    assert faults(ast.parse(text)) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("import numpy", "imports numpy"),
        ("from triton.language import dot", "imports from triton.language"),
        ("from triton.tools.tensor_descriptor import TensorDescriptor", "TensorDescriptor is not read"),
        ("def f(x, y):\n    return x", "f: y is not read"),
        ("def f(x, *, y: int = 1):\n    return x", "f: y is not read"),
        ("def f():\n    N: tl.constexpr = 1", "f: N is not read"),
        ("def f(x):\n    a, b = x\n    a += 1\n    return a", "f: b is not read"),
        ("N = 1", "N is not read"),
        ("def f(x):\n    if False:\n        return x", "line 2 decides on a constant"),
        ("def _f(x):\n    return x", "_f is not read"),
    ],
)
def test_dead_code_is_detected(text: str, fault: str) -> None:
    assert faults(ast.parse(text)) == [fault]


def faults(tree: ast.Module) -> list[str]:
    """Imports besides torch and triton, unused arguments and names, and constant branches."""
    found, made = [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "triton.tools.tensor_descriptor":
            made += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(f"imports from {node.module}")
        if isinstance(node, ast.Import):
            found += [f"imports {a.name}" for a in node.names if a.name not in ("torch", "triton", "triton.language")]
        if isinstance(node, ast.If | ast.IfExp | ast.While) and isinstance(node.test, ast.Constant):
            found.append(f"line {node.lineno} decides on a constant")
        if isinstance(node, ast.FunctionDef):
            found += [f"{node.name}: {name} is not read" for name in _unread(node)]
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    made += [target.id for node in tree.body if isinstance(node, ast.Assign) for target in _names(node.targets)]
    made += [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("_")]
    return found + [f"{name} is not read" for name in made if name not in read]


def _unread(function: ast.FunctionDef) -> list[str]:
    """Arguments and local names of a function that it never reads, in order."""
    given = function.args
    made = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    made += [name.id for name in _names(function.body) if isinstance(name.ctx, ast.Store)]
    read = {name.id for name in _names(function.body) if isinstance(name.ctx, ast.Load)}
    return [name for name in dict.fromkeys(made) if name not in read and name != "_"]


def _names(nodes: list[ast.stmt] | list[ast.expr]) -> Iterator[ast.Name]:
    for node in nodes:
        yield from (name for name in ast.walk(node) if isinstance(name, ast.Name))


def test_the_header_describes_the_kernel() -> None:
    kernel = GOLDEN["decode_merge_kernel"]
    source = render(kernel.spec, kernel.config, GPU)
    assert source.kernel == fingerprint(source.text)
    docstring = ast.get_docstring(ast.parse(source.text))
    assert docstring is not None
    for what in (str(kernel.spec), "NUM_SPLITS=8 merge=kernel", GPU.title, f"kernel {source.kernel[:12]}"):
        assert what in docstring


def test_the_same_text_is_the_same_source() -> None:
    kernel, other = GOLDEN["decode_unsplit"], GOLDEN["decode_merge_chunked"]
    source = render(kernel.spec, kernel.config, GPU)
    assert source == render(kernel.spec, kernel.config, GPU)
    assert source.sha256 == hashlib.sha256(source.text.encode()).hexdigest()
    assert source.sha256 != render(other.spec, other.config, GPU).sha256
    assert source.name == "decode_d128_bf16_g1"


@pytest.mark.parametrize(
    ("spec", "config", "gpu", "reason"),
    [
        (KernelSpec("forward", 64, "bf16"), GOLDEN["decode_unsplit"].config, "h200", "DecodeConfig does not configure"),
        (KernelSpec("forward", 64, "bf16"), ForwardConfig(48, 64, 1, 4, 2), "h200", "BLOCK_M is 48"),
        (
            KernelSpec("decode", 64, "bf16"),
            DecodeConfig(32, 8, 4, "none", 1, 2),
            "h200",
            "merge 'none' cannot be combined",
        ),
        (KernelSpec("forward", 128, "bf16"), ForwardConfig(64, 128, 1, 8, 4), "rtx4090", "bytes of shared memory"),
    ],
)
def test_an_invalid_config_is_not_rendered(
    spec: KernelSpec, config: ForwardConfig | DecodeConfig, gpu: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        render(spec, config, GPUS[gpu])


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the templates, which is used for rendering."""
    copy = tmp_path / "templates"
    shutil.copytree(data_dir("templates"), copy)
    monkeypatch.setattr(render_module, "data_dir", lambda name: tmp_path / name)
    clear_caches()
    yield copy
    clear_caches()


def clear_caches() -> None:
    for remembering in (render_module._environment, render_module._without_fingerprint, render):
        remembering.cache_clear()


# A spec of each template, by its name.
SPEC_OF = {op: KernelSpec(op, 64, "bf16") for op in OPS}


def kernels() -> dict[str, list[str]]:
    """Template -> the fingerprints of its golden kernels."""
    clear_caches()
    found: dict[str, list[str]] = {name: [] for name in SPEC_OF}
    for kernel in GOLDEN.values():
        name = op_of(kernel.spec).template.removesuffix(".py.j2")
        found[name].append(render(kernel.spec, kernel.config, GPU).kernel)
    return found


def test_every_template_has_a_spec_here() -> None:
    assert {op_of(spec).template: name for name, spec in SPEC_OF.items()} == {
        path.name: path.name.removesuffix(".py.j2") for path in data_dir("templates").glob("*.py.j2")
    }


def test_an_unknown_variable_is_an_error(templates: Path) -> None:
    kernel = GOLDEN["decode_unsplit"]
    for unknown in ("{{ no_such_name }}", "{{ config.NO_SUCH_KNOB }}", "{% if spec.no_such_field %}{% endif %}"):
        (templates / "decode.py.j2").write_text(unknown, encoding="utf-8")
        clear_caches()
        with pytest.raises(jinja2.UndefinedError, match=r"no_such_|NO_SUCH_"):
            render(kernel.spec, kernel.config, GPU)


def test_comments_macros_and_macro_names_do_not_change_kernels(templates: Path) -> None:
    """So every measured record stays usable."""
    before = kernels()
    for path in templates.rglob("*.j2"):
        text = path.read_text(encoding="utf-8")
        text = text.replace("    pid = tl.program_id(0)\n", "    pid = tl.program_id(0)  # which\n\n    # -- ours\n")
        text = text.replace("cast_like(", "as_operand(").replace("merge_if_last()", "merged_by_the_last()")
        path.write_text(f"{{#- About\n  this. -#}}\n{text}", encoding="utf-8")
    assert kernels() == before


def changed(path: Path, old: str, new: str) -> set[str]:
    """The templates whose kernels change if `old`, which must exist, is replaced by `new`."""
    before, text = kernels(), path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    after = kernels()
    path.write_text(text, encoding="utf-8")
    return {name for name in SPEC_OF if before[name] != after[name]}


def test_a_code_change_affects_only_kernels_that_contain_it(templates: Path) -> None:
    assert changed(templates / "decode.py.j2", "split = pid % NUM_SPLITS", "split = pid // NUM_SPLITS") == {"decode"}
    assert changed(templates / "parts" / "running_sums.j2", "pt = p * t", "pt = p") == {"forward"}
    assert changed(templates / "decode.py.j2", "{% if form.is_split %}", "{% if config.NUM_SPLITS > 16 %}") == {
        "decode"
    }
    parts, tiled = templates / "parts", {"forward", "dkdv", "dqdr"}
    assert changed(parts / "tiles.j2", "num_tiles - 1 - ", "") == {"forward", "dqdr"}
    assert changed(parts / "scores.j2", "<= {{ form.last_key }}", "< {{ form.last_key }}") == tiled
    assert changed(parts / "header.j2", "import triton\n", "import triton as tr\n") == set(SPEC_OF)
    assert changed(parts / "softmax_stacked.j2", "exp2(m - m_new)", "exp2(m_new - m)") == {"decode", "decode_varlen"}
    assert changed(parts / "split_kv.j2", "% tile_splits", "// tile_splits") == {"decode_varlen"}


def test_indentation_changes_the_kernel(templates: Path) -> None:
    """Moved out of the `if`, the reset of the counter runs in every split, not only in the last one."""
    arrive = '    if tl.atomic_add(arrival_counters_ptr + {{ form.tile }}, 1, sem="acq_rel") == NUM_SPLITS - 1:\n'
    reset = "    tl.store(arrival_counters_ptr + {{ form.tile }}, 0)\n"
    assert changed(templates / "decode.py.j2", f"{arrive}    {reset}", f"{reset}{arrive}") == {"decode"}
