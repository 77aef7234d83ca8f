"""What records say in words that the code has not, for ever: of ops, and of records from before fingerprints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallax_gen.errors import ArgumentError
from parallax_gen.memory.bounds import check_flat, shown
from parallax_gen.problem.spec import FAMILIES, LATER, OPS, KernelSpec, family_of

# By what a record says of its op, and of whether that is ragged: the op.
OPS_OF_RECORDS = {(family_of(op), op not in FAMILIES): op for op in OPS}

LARGEST_READ = {"group": 2**16, "page_size": 2**31}  # a record may be anyone's

_FIELDS = set(KernelSpec("forward", 128, "bf16").flat())


def op_named(family: object, ragged: object) -> str:
    """The op that a record means. Raises ArgumentError."""
    if type(ragged) is not bool:
        raise ArgumentError("ragged", shown(ragged), "True or False")
    if family not in FAMILIES or not isinstance(family, str):
        raise ArgumentError("op", shown(family), ", ".join(FAMILIES))
    if (family, ragged) not in OPS_OF_RECORDS:
        takers = " or ".join(op for op, with_lengths in OPS_OF_RECORDS if with_lengths)
        raise ArgumentError("ragged", f"True with op {family!r}", f"True with op {takers} only")
    return OPS_OF_RECORDS[family, ragged]


def spec_of(family: object, ragged: object, **others: Any) -> KernelSpec:
    """The spec of what a record says of its op, and of all else by the fields of a spec. Raises ArgumentError."""
    return KernelSpec(op_named(family, ragged), **others)


def spec_from(data: Mapping[str, Any]) -> KernelSpec:
    """The spec that `to_dict` wrote. Raises ArgumentError on unknown or missing fields, and on huge numbers."""
    if not _FIELDS - set(LATER) <= set(data) <= _FIELDS:
        raise ArgumentError("spec", sorted(data), f"the fields {sorted(_FIELDS)}")
    others = {name: value for name, value in data.items() if name not in ("op", "ragged")}
    spec = spec_of(data["op"], data["ragged"], **others)
    for name, largest in LARGEST_READ.items():
        if getattr(spec, name) > largest:
            raise ArgumentError(name, f"{getattr(spec, name)!r:.80}", f"at most {largest}")
    return spec


# -- Records from before fingerprints: which of them are of a program that today's templates still render.
#
# They hold a hash of the templates that their kernel was rendered from. Of the hashes below, every kernel that they
# rendered was compared with what the templates of the version render that introduced fingerprints. Who changes an op's
# program takes its hashes out here; tests/memory/test_legacy.py fails until that is done.

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
    return op == spec.family and (packed or not spec.varlen)


# Of a record's environment before fingerprints: "cuda" and "space" came later than the others.
_ENVIRONMENT = {"templates", "triton", "protocol"}


def of_before(data: dict[str, Any]) -> dict[str, Any]:
    """A record from before fingerprints in today's form: the hash of its templates stands for its kernel.

    `space` said what a config's knobs mean; no record ever had another one than 1.
    """
    key = data["key"]
    if not isinstance(key, dict):
        raise ArgumentError("key", shown(key), "an object of its fields")
    check_flat("key", key)
    prefix = "environment."
    environment = {name.removeprefix(prefix): value for name, value in key.items() if name.startswith(prefix)}
    if not _ENVIRONMENT <= set(environment) <= _ENVIRONMENT | {"cuda", "space"} or environment.get("space", 1) != 1:
        raise ArgumentError("key", shown(key), f"environment.* of {sorted(_ENVIRONMENT)}, and cuda")
    templates = environment["templates"]
    if not isinstance(templates, str) or not templates:
        raise ArgumentError("environment.templates", shown(templates), "text")
    evidence = {
        "kernel": "",
        "text": "",
        "triton": environment["triton"],
        "cuda": environment.get("cuda", ""),
        "protocol": environment["protocol"],
        "templates": templates,
    }
    place = {name: value for name, value in key.items() if not name.startswith(prefix)}
    return {name: value for name, value in data.items() if name != "key"} | {"place": place, "evidence": evidence}
