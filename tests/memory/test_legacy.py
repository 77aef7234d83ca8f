"""Records from before fingerprints count as long as their programs are rendered: the golden kernels say whether."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from strategies import GOLDEN

from parallax_gen.codegen.render import render
from parallax_gen.memory.old import SAME, same_programs
from parallax_gen.problem.hardware import GPUS

# Fingerprints of golden kernels when fingerprints were introduced. Not to be written anew: where one of an op differs,
# the op's hashes go from `legacy.SAME`.
THEN = json.loads((Path(__file__).parent / "golden_of_legacy.json").read_text(encoding="utf-8"))


OF_OWN_LENGTHS = "5a31e45e6396"  # of the two templates of decode the one for sequences of their own lengths


@pytest.mark.parametrize("templates", SAME)
def test_the_kernels_of_a_hash_are_still_rendered(templates: str) -> None:
    of_it = {
        name: kernel
        for name, kernel in GOLDEN.items()
        if same_programs(templates, kernel.spec) and kernel.spec.ragged == (templates == OF_OWN_LENGTHS)
    }
    assert of_it.keys() & THEN.keys()
    for name, kernel in of_it.items():
        assert render(kernel.spec, kernel.config, GPUS["h200"]).kernel == THEN.get(name), name
