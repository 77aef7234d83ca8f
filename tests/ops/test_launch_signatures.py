"""What kernels take and what launches pass them, side by side, as templates loop over them."""

from __future__ import annotations

import ast

import pytest
from strategies import GOLDEN

from parallax_gen.codegen.render import render
from parallax_gen.ops.base import op_of
from parallax_gen.problem.hardware import GPUS

KERNELS = {name: op_of(kernel.spec).signatures(kernel.spec, kernel.config) for name, kernel in GOLDEN.items()}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_takes_as_many_as_its_launch_passes(name: str) -> None:
    """Of strides a launch passes a slice, as long as there are names for them."""
    kernel = GOLDEN[name]
    tree = ast.parse(render(kernel.spec, kernel.config, GPUS["h200"]).text)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for short, signature in KERNELS[name].items():
        declared = [argument.arg for argument in functions[f"{short}_kernel"].args.args]
        assert [parameter.split(":")[0] for parameter in signature.parameters] == declared
        for passed in signature.kernel_arguments:
            many = 3 if "[:3]" in passed.expression else 2 if passed.expression.startswith("*") else 1
            assert len(passed.parameters) == many, passed


def test_both_kernels_of_the_forward_are_passed_the_same_before_their_sizes() -> None:
    both = [signatures for signatures in KERNELS.values() if "fixup" in signatures]
    assert both
    for signatures in both:
        for signature in signatures.values():
            assert signature.parameters[-len(signature.unspecialised_arguments) :] == signature.unspecialised
        assert signatures["forward"].specialised_arguments == signatures["fixup"].specialised_arguments
