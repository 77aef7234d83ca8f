"""The environment of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.interpreter
def test_kernels_are_interpreted_without_workers() -> None:
    """Workers inherit TRITON_INTERPRET. Without them conftest.py must set it before anything imports Triton."""
    outside = {name: value for name, value in os.environ.items() if "XDIST" not in name and name != "TRITON_INTERPRET"}
    file = Path(__file__).parent / "codegen" / "test_softcap_kernels.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), "-k", "forward and bf16-0.5"]
    done = subprocess.run(command, cwd=file.parents[2], env=outside, capture_output=True, encoding="utf-8", timeout=100)
    assert done.returncode == 0, done.stdout
