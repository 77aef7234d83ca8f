"""Records from before fingerprints: which of them are of a program that today's templates still render.

They hold a hash of the templates that their kernel was rendered from. Of the hashes below, every kernel that they
rendered was compared with what the templates of the version render that introduced fingerprints. Who changes an op's
program takes its hashes out here; tests/memory/test_legacy.py fails until that is done.
"""

from __future__ import annotations

from parallax_gen.problem.spec import KernelSpec

# By hash of templates: the op, and whether packed sequences have the same program too.
SAME: dict[str, tuple[str, bool]] = {
    "255dd79780b8": ("decode", True),
    "5a31e45e6396": ("decode", True),  # of sequences that have their own lengths
    "7c01cbe51c52": ("forward", True),
    "b81caa5d5816": ("forward", False),
    "37195abe0d1f": ("preprocess", True),
    "96ea5e70a299": ("dkdv", True),
    "dd67d96e1140": ("dkdv", False),
    "75c6b9f971b5": ("dqdr", True),
    "32995f6afadb": ("dqdr", False),
}


def same_programs(templates: str, spec: KernelSpec) -> bool:
    """Whether templates of a hash rendered, of a spec, the kernels that today's do."""
    op, packed = SAME.get(templates, ("", False))
    return op == spec.op and (packed or not spec.varlen)
