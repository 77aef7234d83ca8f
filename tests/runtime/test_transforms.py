"""torch.func transforms and forward-mode AD: right derivatives (by an independent formula) or an error, never 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
from attention_samples import Sample, dense, formula, normal, packed
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from parallax_gen import merge_states, parallax_attn_func, parallax_attn_varlen_func, parallax_attn_with_kvcache
from parallax_gen.compat import fla
from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.drop_in import parallax_kernel_decoding, parallax_kernel_training
from parallax_gen.integrations.drop_in.parallax_kernel_decoding import GraphedDecode
from parallax_gen.nn import ParallaxAttention
from parallax_gen.runtime import attention, transforms

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings about CPU tensors and of torch

ALL_INPUTS = (0, 1, 2, 3)
MASK: dict[str, Any] = {"causal": True, "window_size": 3}
REFUSED = r"create_graph: got a gradient of Parallax attention's gradients; allowed: first derivatives only"


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels record no autograd, so the CPU reference must not either, or it would hide a dropped tangent."""
    inner = attention._reference_forward
    monkeypatch.setattr(attention, "_reference_forward", lambda request: tuple(x.detach() for x in inner(request)))


class Case:
    """A function of q, r, k and v, its formula, and inputs of one sample and of three."""

    def __init__(self, make: Callable[[], Sample]):
        sample = make()
        self.inputs = tuple(x.detach() for x in sample.inputs)
        self.starts = sample.lengths[:2]
        self.many = tuple(torch.stack([x, x.flip(0), x.roll(1, -1)]) for x in self.inputs)
        self.tangents = tuple(torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) for x in self.inputs)
        function: Any = parallax_attn_varlen_func if sample.lengths else parallax_attn_func
        self.ours = lambda *x: function(*x, *sample.lengths, **MASK)
        self.formula = lambda *x: formula(*x, *self.starts, **MASK)

    def wanted(self, transform: Callable[[Any], Any], *inputs: Any) -> Any:
        """The result of a transform of the formula, in float64."""
        return transform(self.formula)(*tree_map(lambda x: x.double(), inputs))

    def check(self, transform: Callable[[Any], Any], *inputs: Any) -> None:
        close(transform(self.ours)(*inputs), self.wanted(transform, *inputs))


def close(result: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(result), tree_leaves(expected), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * (1 + b.abs().max().item()))


def squares(f: Any) -> Any:
    return lambda *x: (f(*x) ** 2).sum()


@pytest.fixture(params=[dense, packed], ids=["dense", "packed"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_reverse_transforms(case: Case) -> None:
    case.check(lambda f: grad(squares(f), ALL_INPUTS), *case.inputs)
    case.check(lambda f: grad_and_value(squares(f), (0, 3)), *case.inputs)
    case.check(lambda f: lambda *x: vjp(f, *x)[1](x[0]), *case.inputs)
    case.check(lambda f: lambda *x: jacrev(lambda q: f(q, *x[1:])[-1, -1].flatten()[:3])(x[0]), *case.inputs)


def test_forward_transforms(case: Case) -> None:
    case.check(lambda f: lambda x, d: jvp(f, x, d), case.inputs, case.tangents)
    case.check(
        lambda f: lambda *x: jacfwd(lambda v: f(*x[:3], v * x[3])[-1, -1])(torch.ones(1, dtype=x[0].dtype)),
        *case.inputs,
    )
    expected = case.wanted(lambda f: lambda x, d: jvp(f, x, d), case.inputs, case.tangents)
    out, pushforward = linearize(case.ours, *case.inputs)
    close((out, pushforward(*case.tangents)), expected)


def test_vmap(case: Case) -> None:
    one_by_one = [case.formula(*(x[i] for x in case.many)) for i in range(3)]
    close(vmap(case.ours)(*case.many), torch.stack(one_by_one))
    last = [x.movedim(0, dim) for x, dim in zip(case.many, (-1, 1, 2, -1), strict=True)]
    close(vmap(case.ours, in_dims=(-1, 1, 2, -1), out_dims=1)(*last), torch.stack(one_by_one, 1))
    q, r, k, v = case.many
    shared = torch.stack([case.formula(q[i], r[0], k[0], v[i]) for i in range(3)])
    close(vmap(case.ours, in_dims=(0, None, None, 0))(q, r[0], k[0], v), shared)
    nested = vmap(vmap(case.ours, in_dims=(0, None, None, 0)), in_dims=(None, 0, None, None))
    per_pair = [torch.stack([case.formula(q[i], r[j], k[0], v[i]) for i in range(3)]) for j in range(3)]
    close(nested(q, r, k[0], v), torch.stack(per_pair))


def test_vmap_over_an_empty_batch(case: Case) -> None:
    q, r, k, v = (x[:0] for x in case.many)
    assert vmap(case.ours)(q, r, k, v).shape == (0, *case.inputs[0].shape)
    result = vmap(grad(squares(case.ours), ALL_INPUTS))(q, r, k, v)
    assert [x.shape for x in result] == [(0, *x.shape) for x in case.inputs]


def test_per_sample_gradients(case: Case) -> None:
    per_sample = vmap(grad(squares(case.ours), ALL_INPUTS), in_dims=(0, 0, None, 0))
    q, r, k, v = case.many
    each = [case.wanted(lambda f: grad(squares(f), ALL_INPUTS), q[i], r[i], k[0], v[i]) for i in range(3)]
    close(per_sample(q, r, k[0], v), [torch.stack(x) for x in zip(*each, strict=True)])
    of_all = grad(lambda *x: (vmap(case.ours, in_dims=(0, 0, None, 0))(*x) ** 2).sum(), ALL_INPUTS)(q, r, k[0], v)
    sums = [torch.stack(x) for x in zip(*each, strict=True)]
    close(of_all, (sums[0], sums[1], sums[2].sum(0), sums[3]))


def test_tangents_under_vmap(case: Case) -> None:
    stacked = tuple(torch.stack([x, 2 * x]) for x in case.tangents)
    pushed = vmap(lambda *d: jvp(case.ours, case.inputs, d)[1])(*stacked)
    tangent = case.wanted(lambda f: lambda x, d: jvp(f, x, d)[1], case.inputs, case.tangents)
    close(pushed, torch.stack([tangent, 2 * tangent]))


def test_cu_seqlens_of_each_sample() -> None:
    case = Case(packed)
    starts = torch.stack([case.starts[0], torch.tensor([0, 1, 2, 5, 6, 9])], 1).int()

    def loss(f: Any) -> Any:
        return lambda q, r, k, v, at: (f(q, r, k, v, at) ** 2).sum()

    ours = loss(lambda q, r, k, v, at: parallax_attn_varlen_func(q, r, k, v, at, case.starts[1], 5, 7, **MASK))
    result = vmap(grad(ours, ALL_INPUTS), in_dims=(0, 0, 0, 0, 1))(*(x[:2] for x in case.many), starts)
    for i in range(2):
        expected = loss(lambda q, r, k, v, at: formula(q, r, k, v, at, case.starts[1], **MASK))
        inputs = [x[i].double() for x in case.many]
        close([x[i] for x in result], grad(expected, ALL_INPUTS)(*inputs, starts[:, i]))


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dual_numbers(case: Case, dtype: torch.dtype, records: bool) -> None:
    inputs, tangents = ([x.to(dtype) for x in xs] for xs in (case.inputs, case.tangents))
    alone = [] if records or dtype == torch.bfloat16 else [(i,) for i in ALL_INPUTS]
    for changed in (ALL_INPUTS, *alone):
        arguments = [x.clone().requires_grad_(records) for x in inputs]
        with fw.dual_level():
            duals = [
                fw.make_dual(x, d) if i in changed else x
                for i, (x, d) in enumerate(zip(arguments, tangents, strict=True))
            ]
            out, tangent = fw.unpack_dual(case.ours(*duals))
        zeros = tuple(d if i in changed else torch.zeros_like(d) for i, d in enumerate(tangents))
        expected = case.wanted(lambda f: lambda *xs: jvp(f, xs[:4], xs[4:]), *inputs, *zeros)
        assert tangent is not None
        assert tangent.dtype == dtype
        tolerance = {"rtol": 2**-7, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        for a, b in zip((out, tangent), expected, strict=True):
            torch.testing.assert_close(a.double(), b, **tolerance)


def test_inputs_without_tangents_inside_a_dual_level(case: Case) -> None:
    with fw.dual_level():
        out = case.ours(*case.inputs)
        assert fw.unpack_dual(out).tangent is None
        inputs = [x.clone().requires_grad_() for x in case.inputs]
        result = torch.autograd.grad(squares(case.ours)(*inputs), inputs)
    close(result, case.wanted(lambda f: grad(squares(f), ALL_INPUTS), *case.inputs))


def test_gradients_of_a_vjp_taken_later(case: Case) -> None:
    """The pullback is called after its transform has ended."""
    _, pullback = vjp(case.ours, *case.inputs)
    with torch.no_grad():
        result = pullback(case.inputs[1])
    close(result, case.wanted(lambda f: lambda *x: vjp(f, *x)[1](x[1]), *case.inputs))


def test_statistics_under_vmap() -> None:
    case = Case(dense)
    outputs = vmap(lambda *x: parallax_attn_func(*x, **MASK, return_stats=True))(*case.many)
    for i in range(3):
        alone = parallax_attn_func(*(x[i] for x in case.many), **MASK, return_stats=True)
        for a, b in zip(outputs, alone, strict=True):
            torch.testing.assert_close(a[i], b)


def test_tensors_that_vmap_passes_to_kernels() -> None:
    """Inputs may have any supported strides; saved tensors of the forward have to be contiguous."""
    seen: list[Any] = []

    def apply(*inputs: Any) -> tuple[Tensor, ...]:
        seen.extend(inputs)
        return (inputs[0] * 1,)

    q, k, lse = torch.randn(1, 5, 4, 16), torch.randn(3, 1, 7, 16, 2).movedim(-1, -2), torch.randn(1, 4, 5)
    args = (q, q, k, k, None, None, 0, 0, False, None, None, lse)
    (result,), dims = transforms.map_samples(apply, 3, (None, None, 0, 0, *(None,) * 8), args)
    assert result.shape == (3, 1, 5, 4, 16)
    assert dims == (0,)
    assert seen[0].shape == (3, 5, 4, 16)
    assert seen[0].stride(0) == 0  # broadcast, not copied
    assert seen[2].shape == (3, 7, 2, 16)
    assert seen[2].stride(-1) == 1
    assert seen[-1].is_contiguous()


def second_derivatives() -> Iterator[tuple[str, Callable[[Any, Any, Any], object]]]:
    """Ways to differentiate f twice at x along d; f is a function of all four inputs."""

    def pulled(f: Any, q: Any, *rest: Any) -> Any:
        return grad(squares(f))(q, *rest)

    def pushed(f: Any, x: Any, d: Any) -> Any:
        return jvp(f, x, d)[1]

    yield "grad of grad", lambda f, x, d: grad(lambda q: pulled(f, q, *x[1:]).sum())(x[0])
    yield "grad of grad by another input", lambda f, x, d: grad(lambda k: pulled(f, *x[:2], k, x[3]).sum())(x[2])
    yield "hessian", lambda f, x, d: hessian(lambda size: squares(f)(size * x[0], *x[1:]))(torch.ones(1))
    yield "forward over reverse", lambda f, x, d: jvp(lambda q: pulled(f, q, *x[1:]), x[:1], d[:1])
    yield "reverse over forward", lambda f, x, d: grad(lambda q: pushed(f, (q, *x[1:]), d).sum())(x[0])
    yield "reverse over a tangent", lambda f, x, d: grad(lambda e: pushed(f, x, (e, *d[1:])).sum())(d[0])
    yield "forward over forward", lambda f, x, d: jvp(lambda q: pushed(f, (q, *x[1:]), d), x[:1], d[:1])
    yield "under vmap", lambda f, x, d: vmap(lambda e: jvp(lambda q: pulled(f, q, *x[1:]), x[:1], (e,)))(d[0][None])

    def leaf(x: Any) -> Any:
        return x[0].clone().requires_grad_()

    def twice(f: Any, x: Any, d: Any) -> object:
        q = leaf(x)
        first = torch.autograd.grad(squares(f)(q, *x[1:]), q, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), q)

    def dual(f: Any, x: Any, d: Any, *, of_do: bool, of_q: bool, before: bool = False) -> object:
        q = leaf(x)
        out = f(q, *x[1:])
        with fw.dual_level():
            out = out if before else f(fw.make_dual(q, d[0]) if of_q else q, *x[1:])
            do = torch.ones_like(q)
            return torch.autograd.grad(out, q, fw.make_dual(do, d[0]) if of_do else do)

    def of_a_tangent(f: Any, x: Any, d: Any) -> object:
        q = leaf(x)
        with fw.dual_level():
            tangent = fw.unpack_dual(f(fw.make_dual(q, d[0]), *x[1:])).tangent
        return torch.autograd.grad(tangent.sum(), q)

    yield "create_graph", twice
    yield "a dual gradient of out", lambda f, x, d: dual(f, x, d, of_do=True, of_q=False)
    yield "a backward of dual inputs", lambda f, x, d: dual(f, x, d, of_do=False, of_q=True)
    yield "a dual gradient after the forward", lambda f, x, d: dual(f, x, d, of_do=True, of_q=False, before=True)
    yield "a gradient of a tangent", of_a_tangent


SECOND = dict(second_derivatives())


@pytest.mark.parametrize("how", SECOND)
def test_second_derivatives_are_refused(case: Case, how: str) -> None:
    with pytest.raises(ArgumentError, match=REFUSED):
        SECOND[how](case.ours, case.inputs, case.tangents)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_autograds_own_batching_is_refused(case: Case, strategy: str) -> None:
    jacobian: Any = torch.autograd.functional.jacobian
    with pytest.raises(ArgumentError, match="is_grads_batched, or jacobian's vectorize: got True"):
        jacobian(case.ours, case.inputs, vectorize=True, strategy=strategy)


def test_statistics_have_no_tangents() -> None:
    q, d = normal(2, 5, 4, 16), normal(2, 5, 4, 16)
    for place in range(4):  # out has a tangent, but returning it with statistics without tangents would mislead
        with pytest.raises(ArgumentError, match="return_stats: got True for an input with a tangent"):
            jvp(lambda x, i=place: parallax_attn_func(x, q, q, q, return_stats=True)[i], (q,), (d,))


def test_out_is_refused() -> None:
    q = normal(2, 5, 4, 16)
    with pytest.raises(ArgumentError, match=r"out: got a tensor, under a transform of torch\.func"):
        grad(lambda x: parallax_attn_func(x, q, q, q, out=torch.empty_like(q)).sum())(q)


def test_bad_input_is_named_under_a_transform() -> None:
    q = normal(2, 5, 4, 16)
    with pytest.raises(ArgumentError, match="r: got shape"):
        vmap(lambda x: parallax_attn_func(x, q[:, :2], q, q))(q[None])
    with pytest.raises(ArgumentError, match="v: got list"):
        grad(lambda x: parallax_attn_func(x, q, q, [1]).sum())(q)  # type: ignore[arg-type]


def test_functionalize_takes_the_operators() -> None:
    case = Case(dense)
    close(torch.func.functionalize(case.ours)(*case.inputs), case.formula(*case.inputs))


def without_derivatives() -> dict[str, Callable[[Tensor], object]]:
    """Functions without derivatives, of a query (1, 1, 4, 64) in fp16."""
    q = normal(1, 1, 4, 64).half()
    folded, rows = q[0].transpose(0, 1), torch.ones(4, 1, 1)
    return {
        "parallax-kernel kvcache": lambda x: parallax_kernel_decoding.parallax_attn_with_kvcache(x, q, q, q),
        "parallax-kernel decode": lambda x: parallax_kernel_decoding.parallax_decode(x, q, q, q, 0.1),
        "parallax-kernel graph": lambda x: GraphedDecode(1, 4, 8, 64, dtype=q.dtype, device="cpu")(q=x),
        "fla decode": lambda x: fla.parallax_decode(x, q, q, q),
        "parallax-kernel forward": lambda x: parallax_kernel_training.parallax_fwd(
            x[0].transpose(0, 1), folded, folded, folded, 0.1
        )[0],
        "parallax-kernel backward": lambda x: parallax_kernel_training.parallax_bwd(
            folded, folded, folded, folded, folded, folded, rows, rows, rows, x[0].transpose(0, 1), 0.1
        )[0],
    }  # fmt: skip


WITHOUT = without_derivatives()


@pytest.mark.parametrize("name", WITHOUT)
def test_functions_without_derivatives_refuse(name: str) -> None:
    function, x = WITHOUT[name], normal(1, 1, 4, 64).half()
    function(x)
    for records in (False, True):
        with fw.dual_level(), pytest.raises(ArgumentError, match="a tensor under a transform"):
            function(fw.make_dual(x.clone().requires_grad_(records), x))
    for transform in (vmap(function), grad(lambda y: function(y[0]).sum())):  # type: ignore[attr-defined]
        with pytest.raises(ArgumentError, match="a tensor under a transform"):
            transform(x[None])


def test_inputs_that_require_grad_under_a_vmap_over_another_input() -> None:
    case = Case(dense)
    q, r, k, v = case.inputs
    q = q.clone().requires_grad_()
    result = vmap(lambda x: x * case.ours(q, r, k, v).sum())(torch.ones(3))
    (of_q,) = torch.autograd.grad(result.sum(), q)
    (expected,) = torch.autograd.grad(3 * case.formula(q, r, k, v).sum(), q)
    torch.testing.assert_close(of_q, expected, rtol=1e-4, atol=1e-4)


def test_attention_against_a_cache_has_no_derivatives() -> None:
    """It supports vmap (test_cached_operators.py). Derivatives are refused at every nesting depth."""
    x = normal(1, 1, 4, 64).half()

    def ours(q: Tensor) -> Tensor:
        out = parallax_attn_with_kvcache(q, x, x, x)
        assert isinstance(out, Tensor)
        return out

    nested = (
        lambda a: jvp(lambda b: ours(a) * b, (x,), (x,))[0],
        lambda a: grad(lambda b: (ours(a) * b).sum())(x),
        lambda a: vmap(ours)(a[None]),
    )
    for function in nested:
        with pytest.raises(ArgumentError, match=r"^q: got a tensor"):
            jvp(function, (x,), (x,))
    with pytest.raises(ArgumentError, match="a tensor that needs gradients"):
        grad(lambda a: vmap(ours)(a).sum())(x[None])
    with fw.dual_level(), pytest.raises(ArgumentError, match="a tensor with a tangent"):
        parallax_attn_with_kvcache(fw.make_dual(x, x), x, x, x)
    with pytest.raises(ArgumentError, match="a tensor that needs gradients"):
        grad(lambda y: parallax_attn_with_kvcache(y, x, x, x).sum())(x)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "function",
    [
        lambda *x: parallax_kernel_training.parallax_func(*(y.transpose(1, 2) for y in x)).transpose(1, 2),
        parallax_kernel_training.parallax_varlen_func,
        fla.parallel_parallax,
        lambda *x: fla.parallel_parallax(*x, cu_seqlens=torch.tensor([0, 5])),
    ],
)
def test_drop_ins_for_training(function: Any) -> None:
    inputs = tuple(normal(1, 5, heads, 16).half() / 2 for heads in (4, 4, 2, 2))
    changes = tuple(x.flip(1) for x in inputs)
    doubles = tuple(x.double() for x in inputs)
    expected = jvp(lambda *x: formula(*x, causal=True), doubles, tuple(d.double() for d in changes))
    for a, b in zip(jvp(function, inputs, changes), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-9, atol=2**-9)
    result = vmap(grad(lambda *x: function(*x).float().sum(), ALL_INPUTS))(*(x[None] for x in inputs))
    for a, b in zip(result, grad(lambda *x: formula(*x, causal=True).sum(), ALL_INPUTS)(*doubles), strict=True):
        torch.testing.assert_close(a[0].double(), b, rtol=2**-9, atol=2**-8)


def test_merging_states() -> None:
    """It uses plain operators, so tangents are right. Gradients would reach only `out` of the returned state."""
    q, k = normal(2, 5, 4, 16), normal(2, 6, 4, 16)
    states = [parallax_attn_func(q, q / 4, keys, keys, return_stats=True) for keys in (k[:, :3], k[:, 3:])]
    changes = tuple(tuple(torch.randn_like(x) for x in state) for state in states)
    _, result = jvp(lambda a, b: tuple(merge_states(a, b)), tuple(states), changes)
    step = 1e-3
    near = [
        [tuple(x + s * d for x, d in zip(*pair, strict=True)) for pair in zip(states, changes, strict=True)]
        for s in (step, -step)
    ]
    for tangent, high, low in zip(result, *(merge_states(*each) for each in near), strict=True):
        torch.testing.assert_close(tangent, (high - low) / (2 * step), rtol=1e-2, atol=1e-2)
    x = q.clone().requires_grad_()
    state = parallax_attn_func(x, q / 4, k, k, return_stats=True)
    with pytest.raises(ArgumentError, match=r"states\[1\]: got an out that needs gradients"):
        merge_states(states[0], state)
    with torch.no_grad():
        merge_states(states[0], state)


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer(packed: bool) -> None:
    layer = ParallaxAttention(16, 2, 1, qk_norm=True, rope_theta=1e4)
    lengths = (torch.tensor([0, 2, 6], dtype=torch.int32), 4) if packed else ()
    xs = normal(3, 6, 16) if packed else normal(3, 2, 5, 16)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(layer, parameters, (x, *lengths))
        return (out**2).sum()

    result = vmap(grad(loss), in_dims=(None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        expected = torch.autograd.grad((layer(x, *lengths) ** 2).sum(), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(result[name][i], gradient, rtol=1e-4, atol=1e-4)
    # The derivative along x in forward and reverse mode: <J d, y> = <d, J^T y>.
    x, d = xs[0], xs[1]
    out, pushed = jvp(lambda x: layer(x, *lengths), (x,), (d,))
    pulled = vjp(lambda x: layer(x, *lengths), x)[1](out)[0]
    torch.testing.assert_close((pushed * out).sum(), (pulled * d).sum(), rtol=1e-4, atol=1e-4)
