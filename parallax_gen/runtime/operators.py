"""The namespace of our torch operators."""

from __future__ import annotations

NAMESPACE = "parallax_gen"


def operator_name(name: str) -> str:
    """The qualified name of an operator, as torch.library takes it."""
    return f"{NAMESPACE}::{name}"
