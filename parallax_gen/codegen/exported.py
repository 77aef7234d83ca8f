"""The README.md next to exported kernels: how to call each, and where it comes from."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import parallax_gen
from parallax_gen.errors import ParallaxGenError

FIRST_LINE = "# Parallax attention kernels, exported by parallax_gen"


def read_sections(path: Path) -> dict[str, str]:
    """The sections of an earlier export's README at `path`, by file name, for files that still exist.

    Raises ParallaxGenError if the file is not from an export: it must not be overwritten.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ParallaxGenError(f"cannot read {path}: {error}") from error
    if not text.startswith(FIRST_LINE):
        raise ParallaxGenError(f"{path} is not from an export, and would be overwritten: choose another folder")
    parts = re.split(r"^## (\S+\.py)\n", text, flags=re.MULTILINE)[1:]
    bodies = dict(zip(parts[::2], parts[1::2], strict=True))
    return {name: body.strip() for name, body in bodies.items() if (path.parent / name).exists()}


def write_sections(path: Path, sections: dict[str, str]) -> None:
    """Write the file: an introduction, then a section per kernel."""
    introduction = f"""{FIRST_LINE} {parallax_gen.__version__}

Each file is one kernel with its `launch`, and needs torch and triton only. `launch` writes to the tensors that it is
given, on the current CUDA stream; it allocates nothing, checks nothing and returns nothing. `softmax_scale` is usually
`head_dim ** -0.5`. A kernel is correct for all sizes with its head_dim, dtype and number of query heads per kv head;
it is fast near the sizes it was made for."""
    bodies = (f"## {name}\n\n{sections[name]}" for name in sorted(sections))
    path.write_text("\n\n".join([introduction, *bodies]) + "\n", encoding="utf-8")


def section(source: str, what: str, gpu_title: str, provenance: str, for_c: Sequence[str] = ()) -> str:
    """The section of one kernel: what it is, where it comes from, and the signature and docstring of its launch.

    for_c  the files with which a C program launches it
    """
    launch = next(
        node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "launch"
    )
    arguments = ", ".join(argument.arg for argument in launch.args.args)
    c_files = f"\n- for C: {', '.join(for_c)}" if for_c else ""
    return f"""- {what}
- for {gpu_title}
- from: {provenance}{c_files}

```python
launch({arguments})
```

```text
{ast.get_docstring(launch)}
```"""
