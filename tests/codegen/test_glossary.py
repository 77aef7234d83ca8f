"""templates/README.md explains every name in rendered kernels, and no other."""

from __future__ import annotations

import ast
import re

import pytest
from strategies import GOLDEN, Kernel, random_kernels

from parallax_gen.codegen.render import render
from parallax_gen.files import data_dir
from parallax_gen.problem.hardware import GPUS

GPU = GPUS["h200"]

# Endings and beginnings that the README's table of patterns explains.
ENDINGS = r"_ptrs?|_offsets?|_head|_block|_row|_splits|_chunk|_stack|_qr|_\d|_this|_other|64|32|_desc|_desc_\d+"
BEGINNINGS = r"stride_|offs_|mask_|range_|start_|num_|total_|first_"
# Names in the table of patterns, and names that need no explanation.
PLAIN = {
    "half",
    "HALF_DIM",
    "rows64",
    "_",
    "i",
    "x",
    "mask",
    "stride",
    "row",
    "query",
    "offsets",
    "root",
    "LN_2",
    "LOG2_E",
    "TWO_LOG2_E",
    "HEAD_DIM",
}
PLAIN |= {
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cache_seqlens",
    "cache_leftpad",
    "BLOCK_M",
    "BLOCK_N",
    "BLOCK_H",
    "PAGE_SIZE",
    "key_begin",
    "key_end",
    "row_begin",
    "row_end",
}


def explained() -> set[str]:
    """The names in the first column of the table of names."""
    text = (data_dir("templates") / "README.md").read_text(encoding="utf-8")
    table = text.split("| name | meaning | shape |", 1)[1].split("\n\n", 1)[0]
    return {name for line in table.splitlines()[2:] for name in re.split(r"[,;] ", line.split("|")[1].strip())}


def names_of(kernel: Kernel) -> set[str]:
    """The parameters and locals of a file's kernels and functions, except `launch`, whose docstring explains them."""
    tree = ast.parse(render(kernel.spec, kernel.config, GPU).text)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name != "launch"]
    found = {arg.arg for function in functions for arg in function.args.args}
    for function in functions:
        found |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


@pytest.fixture(scope="module")
def names() -> set[str]:
    return set().union(*(names_of(kernel) for kernel in (*GOLDEN.values(), *random_kernels(200, GPU))))


def test_every_name_is_explained(names: set[str]) -> None:
    known, unexplained = explained() | PLAIN, []
    for name in sorted(names):
        base = name
        while base not in known and (shorter := re.sub(rf"(?:{ENDINGS})$", "", base)) != base:
            base = shorter
        if base not in known and not re.match(rf"(?:{BEGINNINGS})\w+$", name):
            unexplained.append(name)
    assert unexplained == []


def test_every_explained_name_is_used(names: set[str]) -> None:
    used = names | {re.sub(r"_ptrs?$", "", name) for name in names}
    assert sorted(explained() - used) == []
