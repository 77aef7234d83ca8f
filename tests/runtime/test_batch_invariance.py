"""The argument batch_invariant and the process's mode: which kernels calls ask for, forward and backward."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from attention_samples import dense, normal, packed
from dispatched_kernels import recorded_kernels
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import parallax_gen
from parallax_gen import (
    GraphedDecode,
    kvcache_workspace_size,
    parallax_attn_func,
    parallax_attn_varlen_func,
    parallax_attn_with_kvcache,
)
from parallax_gen.compat.parallax_kernel import parallax_bwd, parallax_func, parallax_fwd
from parallax_gen.distributed import ring_attn_func
from parallax_gen.errors import ArgumentError
from parallax_gen.nn import ParallaxAttention
from parallax_gen.ops.base import Scratch
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime import attention, graphed, kvcache
from parallax_gen.runtime.invariance import is_batch_invariant
from parallax_gen.runtime.plan import LaunchPlan, PlanCache

pytestmark = pytest.mark.filterwarnings("ignore")  # that these are CPU tensors, and of torch's compiler

TRAINING = {"forward", "preprocess", "dkdv", "dqdr"}


def flags_of(launched: Any) -> dict[str, set[bool]]:
    """By op, batch_invariant of the kernels that were asked for."""
    flags: dict[str, set[bool]] = {}
    for spec, _ in launched:
        flags.setdefault(spec.op, set()).add(spec.batch_invariant)
    return flags


def only(flag: bool, *ops: str) -> dict[str, set[bool]]:
    """`flags_of` where each of these ops, and no other, was asked for with this flag."""
    return {op: {flag} for op in ops}


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cached(batch: int = 2, queries: int = 1, keys: int = 9, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, r, k_cache and v_cache: 4 query heads over 2 kv heads."""
    return [normal(batch, queries, 4, 16, dtype=dtype)] * 2 + [normal(batch, keys, 2, 16, dtype=dtype)] * 2


# -- The mode.


@given(modes=st.lists(st.booleans(), max_size=5), fails=st.booleans())
def test_contexts_nest(modes: list[bool], fails: bool) -> None:
    def enter(rest: list[bool], outer: bool) -> None:
        assert is_batch_invariant(None) == outer
        if not rest:
            assert [is_batch_invariant(given) for given in (True, False)] == [True, False]
            if fails:
                raise KeyError
            return
        try:
            with parallax_gen.batch_invariant(rest[0]):
                enter(rest[1:], rest[0])
        finally:
            assert is_batch_invariant(None) == outer

    with pytest.raises(KeyError) if fails else nullcontext():
        enter(modes, False)
    assert not is_batch_invariant(None)


def test_the_mode_stays_until_it_is_set_again() -> None:
    before = parallax_gen.batch_invariant()
    assert is_batch_invariant(None)
    parallax_gen.batch_invariant(True)
    with parallax_gen.batch_invariant(False), before:
        assert not is_batch_invariant(None)
    parallax_gen.batch_invariant(False)
    assert not is_batch_invariant(None)


@pytest.mark.parametrize(
    ("value", "printed"), [("1", "True"), ("on", "True"), ("0", "False"), (None, "False"), ("maybe", "ArgumentError")]
)
def test_the_environment_says_how_the_mode_begins(
    value: str | None, printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("PARALLAX_GEN_BATCH_INVARIANT", value)
    program = """
from parallax_gen.errors import ArgumentError
try:
    from parallax_gen import parallax_attn_func
    from parallax_gen.runtime.invariance import is_batch_invariant
    print(is_batch_invariant(None))
except ArgumentError as error:
    assert str(error).startswith("PARALLAX_GEN_BATCH_INVARIANT: got 'maybe'; allowed: 1, true"), error
    print("ArgumentError")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == printed


@pytest.mark.parametrize("value", [1, 0, "yes", 1.0])
def test_anything_but_a_bool_is_refused(value: Any) -> None:
    q, r, k, v = (x.detach() for x in dense().inputs)
    one, varlen = cached(), packed()
    with torch.no_grad():
        for call in (
            lambda: parallax_attn_func(q, r, k, v, batch_invariant=value),
            lambda: parallax_attn_varlen_func(*varlen.inputs, *varlen.lengths, batch_invariant=value),
            lambda: parallax_attn_with_kvcache(*one, batch_invariant=value),
            lambda: kvcache_workspace_size(*one, batch_invariant=value),
            lambda: GraphedDecode(*one, batch_invariant=value),
            lambda: ring_attn_func(q, r, k, v, batch_invariant=value),
            lambda: ParallaxAttention(32, 2, batch_invariant=value),
        ):
            with pytest.raises(ArgumentError, match=r"^batch_invariant: got .*; allowed: True, False, or None for the"):
                call()
    with pytest.raises(ArgumentError, match=r"^mode: got .*; allowed: True or False"):
        parallax_gen.batch_invariant(value)
    assert not is_batch_invariant(None)


# -- What calls ask for.


@pytest.mark.parametrize("argument", [True, False, None])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("recompute_v_mean", [True, False])
def test_the_forward_and_its_backward(argument: bool | None, mode: bool, recompute_v_mean: bool) -> None:
    """The backward does as its forward, even if the mode has changed since."""
    options = {"batch_invariant": argument, "recompute_v_mean": recompute_v_mean}
    for sample in (dense(), packed()):
        function: Any = parallax_attn_varlen_func if sample.lengths else parallax_attn_func
        with recorded_kernels() as launched:
            with parallax_gen.batch_invariant(mode):
                out = function(*sample.inputs, *sample.lengths, causal=True, window_size=3, **options)
            with parallax_gen.batch_invariant(not mode):
                out.sum().backward()
        expected = mode if argument is None else argument
        assert flags_of(launched) == only(expected, *TRAINING)


def test_results_on_the_cpu_stay_the_same() -> None:
    for sample in (dense(), packed()):
        function: Any = parallax_attn_varlen_func if sample.lengths else parallax_attn_func
        one, two = (function(*sample.inputs, *sample.lengths, batch_invariant=flag) for flag in (True, False))
        assert torch.equal(one, two)
        for a, b in zip(*(torch.autograd.grad(x.sum(), sample.inputs) for x in (one, two)), strict=True):
            assert torch.equal(a, b)
    for options in ({}, {"cache_seqlens": 5}, {"cache_seqlens": ints(3, 9), "return_state": True}):
        results = (parallax_attn_with_kvcache(*cached(), **options, batch_invariant=flag) for flag in (True, False))
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("mode", [True, False])
def test_transforms_and_autocast(mode: bool) -> None:
    q, r, k, v = (x.detach() for x in dense().inputs)
    with parallax_gen.batch_invariant(mode), recorded_kernels() as launched:
        torch.func.grad(lambda q, v: parallax_attn_func(q, r, k, v).sum(), argnums=(0, 1))(q, v)
        torch.func.vmap(torch.func.grad(lambda x: parallax_attn_func(x, x, k, v).sum()))(torch.stack([q, r]))
        torch.func.vmap(lambda x: parallax_attn_with_kvcache(x, x, k, v))(torch.stack([q, r]))
        with torch.autocast("cpu", torch.bfloat16):
            parallax_attn_func(q, r, k, v)
            parallax_attn_with_kvcache(q, r, k, v)
    assert flags_of(launched) == only(mode, *TRAINING, "decode_varlen")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_seqlens": 5},
        {"cache_seqlens": ints(3, 9)},
        {"cache_leftpad": ints(1, 0)},
        {"window_size": 20, "causal": True},
        {"softcap": 30.0, "return_state": True},
    ],
)
def test_decode_always_reads_lengths_on_the_device(options: dict[str, Any]) -> None:
    with recorded_kernels() as launched:
        parallax_attn_with_kvcache(*cached(), **options, batch_invariant=True)
        with parallax_gen.batch_invariant():
            parallax_attn_with_kvcache(*cached(), **options)
            kvcache_workspace_size(*cached(), **options)
    ((spec, _),) = launched
    assert (spec.op, spec.batch_invariant) == ("decode_varlen", True)
    assert launched.total() == 3


def test_a_dense_cache_of_all_keys_gets_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel reads them, though the caller gave none."""
    seen = []

    class Plan(LaunchPlan):
        def __init__(self, spec: KernelSpec, *_: Any):
            self.per_sequence_lengths, self.scratch = spec.per_sequence_lengths, Scratch()

        def launch(self, request: Any, written: Any, workspace: Any = None) -> None:
            seen.append(request)

    monkeypatch.setattr(kvcache, "plan_launch", Plan)
    monkeypatch.setattr(kvcache, "host_plan", lambda q, k: None)
    monkeypatch.setattr(kvcache, "_plans", PlanCache())
    for options in ({}, {"cache_seqlens": 5}) * 2:  # planned, then known
        parallax_attn_with_kvcache(*cached(), **options, batch_invariant=True)
    assert [request.cache_seqlens.tolist() for request in seen] == [[9, 9], [5, 5]] * 2
    parallax_attn_with_kvcache(*cached(), batch_invariant=False)
    assert seen[-1].cache_seqlens is None


def test_plans_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal calls share a plan; calls that differ in batch_invariant do not, whatever says it."""
    caches = {(attention, "_forwards"): PlanCache(), (attention, "_backwards"): PlanCache()}
    caches[kvcache, "_plans"] = PlanCache()
    for (module, name), plans in caches.items():
        monkeypatch.setattr(module, name, plans)
    sample = dense()
    for _ in range(2):
        for argument in (True, False, None):
            with parallax_gen.batch_invariant(argument is None):
                parallax_attn_func(*sample.inputs, batch_invariant=argument).sum().backward()
                parallax_attn_with_kvcache(*cached(), batch_invariant=argument)
    assert [len(plans) for plans in caches.values()] == [2, 2, 2]


# -- torch.compile.


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def flags_in(counter: CompileCounterWithBackend) -> list[Any]:
    """The argument of each operator in the graphs, in order."""
    nodes = [node for graph in counter.graphs for node in graph.graph.nodes if "parallax_gen" in str(node.target)]
    return [node.args[_position(node)] for node in nodes]


def _position(node: Any) -> int:
    return [argument.name for argument in node.target._schema.arguments].index("batch_invariant")


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_follows_the_argument_and_the_mode() -> None:
    q, r, k, v = (x.detach() for x in dense().inputs)

    def step(flag: bool | None) -> Tensor:
        return parallax_attn_func(q, r, k, v, batch_invariant=flag) + parallax_attn_with_kvcache(q, r, k, v).sum()

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for flag, flags in ((True, [True, False]), (None, [False, False]), (None, [False, False])):
        torch.testing.assert_close(compiled(flag), step(flag))
        assert flags_in(counter)[-2:] == flags
    assert counter.frame_count == 2
    for mode in (True, False, True):  # compiled once more, for the other mode
        with parallax_gen.batch_invariant(mode):
            compiled(None)
    assert flags_in(counter)[-2:] == [True, True]
    assert counter.frame_count == 3


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_context_within_compiled_code() -> None:
    q, r, k, v = (x.detach() for x in dense().inputs)

    def step() -> Tensor:
        with parallax_gen.batch_invariant():
            inner = parallax_attn_func(q, r, k, v)
        return inner + parallax_attn_func(q, r, k, v)

    counter = CompileCounterWithBackend("eager")
    torch.compile(step, fullgraph=True, backend=counter)()
    assert flags_in(counter) == [True, False]
    assert not is_batch_invariant(None)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("flag", [True, False])
def test_the_backward_of_compiled_code(flag: bool) -> None:
    layer = ParallaxAttention(32, 4, 2, batch_invariant=flag)
    with recorded_kernels() as launched:
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(2, 5, 32)).sum().backward()
    assert flags_of(launched) == only(flag, *TRAINING)


@pytest.mark.usefixtures("fresh_dynamo")
def test_an_exported_program_keeps_it() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return parallax_attn_func(q, q, k, k) + parallax_attn_with_kvcache(q, q, k, k)

    q, _, k, _ = (x.detach() for x in dense().inputs)
    with parallax_gen.batch_invariant():
        program = torch.export.export(Attention(), (q, k))
    with recorded_kernels() as launched:
        program.module()(q, k)
    assert flags_of(launched) == {"forward": {True}, "decode_varlen": {True}}


# -- What calls these functions.


def test_the_layer() -> None:
    x = torch.randn(2, 5, 32)
    for argument, mode, expected in (
        (None, True, True),
        (None, False, False),
        (True, False, True),
        (False, True, False),
    ):
        layer = ParallaxAttention(32, 4, batch_invariant=argument)
        with parallax_gen.batch_invariant(mode), recorded_kernels() as launched:
            layer(x)
            layer(x.flatten(0, 1), ints(0, 5, 10), 5)
        assert flags_of(launched) == {"forward": {expected}}
    assert "batch_invariant=True" in repr(ParallaxAttention(32, 4, batch_invariant=True))
    assert "batch_invariant" not in repr(ParallaxAttention(32, 4))


@pytest.mark.parametrize("mode", [True, False])
def test_drop_ins_follow_the_mode(mode: bool) -> None:
    q, k = normal(1, 2, 6, 16, dtype=torch.bfloat16), normal(1, 1, 6, 16, dtype=torch.bfloat16)
    with parallax_gen.batch_invariant(mode), recorded_kernels() as launched:
        parallax_func(q.requires_grad_(), q, k.requires_grad_(), k).sum().backward()
    assert flags_of(launched) == only(mode, *TRAINING)
    q, k = q.detach()[0], k.detach()[0]
    with parallax_gen.batch_invariant(mode), recorded_kernels() as launched:
        out, *saved = parallax_fwd(q, q, k, k, 1.0, 2)
        parallax_bwd(q, q, k, k, out, *saved, torch.ones_like(out), 1.0, 2)
    assert flags_of(launched) == only(mode, *TRAINING)


@pytest.mark.parametrize("argument", [True, False, None])
def test_a_graph_passes_it_to_both_functions(argument: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the capture is only acted."""
    seen = []

    def size(*_: Any, **options: Any) -> int:
        seen.append(options["batch_invariant"])
        return 0

    def attend(*_: Any, **options: Any) -> None:
        seen.append(options["batch_invariant"])

    class OnCuda(Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(graphed, "kvcache_workspace_size", size)
    monkeypatch.setattr(graphed, "parallax_attn_with_kvcache", attend)
    for name in ("CUDAGraph", "Stream"):
        monkeypatch.setattr(torch.cuda, name, type(name, (), {"wait_stream": lambda *_: None}))
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
    q, r, k, v = cached()
    GraphedDecode(q.as_subclass(OnCuda), r, k, v, batch_invariant=argument)
    assert seen == [argument] * 3


def test_forward_mode_ad_is_refused() -> None:
    q, r, k, v = (x.detach() for x in dense().inputs)
    with pytest.raises(ArgumentError, match=r"^batch_invariant: got True; allowed: False .*tangents are computed"):
        torch.func.jvp(lambda x: parallax_attn_func(x, r, k, v, batch_invariant=True), (q,), (q,))
    with parallax_gen.batch_invariant():
        torch.func.jvp(lambda x: parallax_attn_func(x, r, k, v, batch_invariant=False), (q,), (q,))


def test_ring_attention_is_refused() -> None:
    q, r, k, v = (x.detach() for x in dense(4, 4).inputs)
    message = r"^batch_invariant: got True; allowed: .*False.*the bits of ring attention depend on the number of ranks"
    with pytest.raises(ArgumentError, match=message):
        ring_attn_func(q, r, k, v, batch_invariant=True)
    with parallax_gen.batch_invariant():
        with pytest.raises(ArgumentError, match=message):
            ring_attn_func(q, r, k, v)
        with pytest.raises(ArgumentError, match=r"^group"):  # accepted; there is no group here
            ring_attn_func(q, r, k, v, batch_invariant=False)
