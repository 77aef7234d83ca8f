"""The namespace of this package's torch operators: the one that kernel-builder made for this build."""

from __future__ import annotations

import importlib
import re
from typing import Any

from parallax_gen.hub.package.records import ROOT


def _namespace() -> str:
    try:
        built: Any = importlib.import_module(f"{ROOT}._ops")  # kernel-builder writes it
    except ModuleNotFoundError:  # imported from the sources
        return re.sub(r"\W", "_", ROOT)
    prefix: str = built.add_op_namespace_prefix("")
    return prefix.rstrip(":")


NAMESPACE = _namespace()


def operator_name(name: str) -> str:
    """The qualified name of an operator, as torch.library takes it."""
    return f"{NAMESPACE}::{name}"
