"""The parameters of kernels and the arguments of launches correspond, since templates loop over both."""

from __future__ import annotations

import ast

import pytest
from strategies import GOLDEN

from parallax_gen.codegen.render import render
from parallax_gen.ops.base import op_of
from parallax_gen.problem.hardware import GPUS

KERNELS = {name: op_of(kernel.spec).signatures(kernel.spec, kernel.config) for name, kernel in GOLDEN.items()}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_has_a_parameter_for_each_launch_argument(name: str) -> None:
    """For strides a launch passes a slice with one entry per parameter."""
    kernel = GOLDEN[name]
    tree = ast.parse(render(kernel.spec, kernel.config, GPUS["h200"]).text)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for short, signature in KERNELS[name].items():
        declared = [argument.arg for argument in functions[f"{short}_kernel"].args.args]
        assert [parameter.split(":")[0] for parameter in signature.parameters] == declared
        for passed in signature.kernel_arguments:
            many = 3 if "[:3]" in passed.expression else 2 if passed.expression.startswith("*") else 1
            assert len(passed.parameters) == many, passed


def test_the_forward_and_fixup_kernels_share_their_first_arguments() -> None:
    both = [signatures for signatures in KERNELS.values() if "fixup" in signatures]
    assert both
    for signatures in both:
        for signature in signatures.values():
            assert signature.parameters[-len(signature.unspecialized_arguments) :] == signature.unspecialized
        forward, fixup = signatures["forward"].specialized_arguments, signatures["fixup"].specialized_arguments
        described = [argument for argument in forward if argument.endswith("_desc")]
        assert described in ([], ["k_desc", "v_desc"])
        if described:  # the fix-up kernel loads k and v by pointers
            assert {"k", "v", "*k.stride()[:3]", "*v.stride()[:3]"} <= set(fixup)
            assert set(forward) - set(fixup) == {*described, "k.stride(0)", "k.stride(2)"}
        else:
            assert forward == fixup
