"""The drop-ins on a card: against the fp64 oracle, and against the original packages if they are installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from assertions import assert_close
from program_runner import PROGRAMS, run_program
from torch import Tensor

from parallax_gen.compat import fla, parallax_kernel, parallax_kernel_triton
from parallax_gen.oracle.accuracy import errors, gradient_term_sizes, tolerance
from parallax_gen.oracle.kvcache import reference_cached_forward
from parallax_gen.oracle.reference import reference_backward, reference_forward, reference_varlen_forward

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def leaves(
    seqlen_q: int = 300,
    seqlen_kv: int = 300,
    *,
    batch: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Leaves (batch, seqlen, heads, head_dim), 4 query heads over 2 kv heads; s and t have unit variance."""
    sizes = [(batch, seqlen_q, 4, head_dim)] * 2 + [(batch, seqlen_kv, 2, head_dim)] * 2
    q, r, k, v = (torch.randn(size, device=DEVICE).to(dtype) for size in sizes)
    return [x.requires_grad_() for x in (q, r * head_dim**-0.5, k, v)]


def folded(*tensors: Tensor) -> list[Tensor]:
    """Heads folded into the batch, as parallax-kernel's raw kernels take them."""
    return [x.detach().transpose(1, 2).flatten(0, 1).contiguous() for x in tensors]


def assert_gradients_close(result: Any, expected: Any, inputs: list[Tensor], do: Tensor, name: str = "bf16") -> None:
    """As in tests/gpu/test_training.py: twice the forward's tolerance."""
    sizes = gradient_term_sizes(*[x.detach() for x in inputs], do)
    for x, grad, ref, natural in zip(inputs, result, expected, sizes, strict=True):
        assert grad.shape == x.shape
        off = errors(grad, ref, float(natural))
        assert off.relative <= 2 * tolerance(name), off
        assert off.worst <= 10 * tolerance(name), off


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program(program: Path) -> None:
    run_program(program, DEVICE)


@pytest.mark.parametrize("window", [-1, 64, 200, 257])
@pytest.mark.parametrize("seqlen_q", [300, 130])
def test_parallax_kernel_training(seqlen_q: int, window: int) -> None:
    """Query i is at key i, so no query sees keys after the last query."""
    inputs = leaves(seqlen_q)
    near = [x if x.shape[2] == 4 else x[:, :seqlen_q] for x in inputs]
    options: Any = {"causal": True, "window_size": window if window > 0 else None}
    expected = reference_forward(*[x.detach() for x in near], **options)
    do = torch.randn_like(inputs[0])
    target = reference_backward(*near, do, **options)
    unseen = (0, 0, 0, 0, 0, 300 - seqlen_q)
    wanted_of_all = [*target[:2], *[torch.nn.functional.pad(x, unseen) for x in target[2:]]]

    out = parallax_kernel.parallax_func(*[x.transpose(1, 2) for x in inputs], window_size_left=window)
    assert out.is_contiguous()
    assert_close(out.transpose(1, 2), expected.out, "bf16")
    grads = torch.autograd.grad(out, inputs, do.transpose(1, 2))
    assert_gradients_close(grads, wanted_of_all, inputs, do)

    raw = folded(*inputs)
    o, barv, d1, bart, m = parallax_kernel.parallax_fwd(*raw, 64**-0.5, 2, window)
    assert_close(o, out.flatten(0, 1).double(), "bf16")
    assert_close(barv, expected.v_mean.transpose(1, 2).flatten(0, 1), "bf16")
    # Statistics are summed in fp32; fp16's tolerance allows for the error of their exponentials.
    assert_close(d1 * m.exp2(), expected.lse.exp().flatten(0, 1)[..., None], "fp16")
    assert_close(bart, expected.t_mean.flatten(0, 1)[..., None], "fp16")
    largest = m - torch.rand_like(m)  # as parallax-kernel's forward returns it, in two tensors
    for factor, exponent in ((d1, m), ((m - largest).exp2(), largest)):
        result = parallax_kernel.parallax_bwd(*raw, o, barv, factor, bart, exponent, folded(do)[0], 64**-0.5, 2, window)
        assert_gradients_close(result, [folded(x)[0] for x in wanted_of_all], raw, folded(do)[0])


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (100, torch.float16), (60, torch.bfloat16)])
@pytest.mark.parametrize("window", [None, 97])
def test_packed_sequences(window: int | None, head_dim: int, dtype: torch.dtype) -> None:
    inputs = leaves(batch=1, head_dim=head_dim, dtype=dtype)
    starts = torch.tensor([0, 3, 3, 200, 300], device=DEVICE)
    packed = [x.detach()[0] for x in inputs]
    expected = reference_varlen_forward(*packed, starts, starts, causal=True, window_size=window).out[None]
    name = "fp16" if dtype == torch.float16 else "bf16"
    out = fla.parallel_parallax(*inputs, window_size=window, cu_seqlens=starts)
    assert_close(out, expected, name)
    also = parallax_kernel.parallax_varlen_func(*inputs, window_size_left=window or -1, cu_seqlens=starts)
    assert torch.equal(also, out)
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("head_dim", [64, 100])
@pytest.mark.parametrize("window", [None, 97])
@pytest.mark.parametrize("seqlen_q", [1, 40, 300])
def test_fla_decode(seqlen_q: int, window: int | None, head_dim: int) -> None:
    inputs = [x.detach() for x in leaves(seqlen_q, head_dim=head_dim)]
    starts = torch.tensor([0, 280], device=DEVICE)
    for cache_start in (None, starts):
        options: Any = {"causal": True, "window_size": window, "cache_leftpad": cache_start}
        expected = reference_cached_forward(*inputs, **options).out
        result = fla.parallax_decode(*inputs, window_size=window, cache_start=cache_start)
        assert_close(result, expected, "bf16")
        if seqlen_q == 1:
            assert torch.equal(fla.parallax_decode_one_step(*inputs, None, window, cache_start), result)
            triton_ones = parallax_kernel_triton.parallax_decode(
                *inputs, window_size_left=window or -1, cache_start=cache_start
            )
            assert torch.equal(triton_ones, result)


def cached(batch: int = 3, seqlen: int = 1000, heads: int = 8, kv_heads: int = 2) -> list[Tensor]:
    rows = [torch.randn(batch, 1, heads, 128, device=DEVICE).bfloat16() for _ in range(2)]
    keys = [torch.randn(batch, seqlen, kv_heads, 128, device=DEVICE).bfloat16() for _ in range(2)]
    return [rows[0], rows[1] * 128**-0.5, *keys]


@pytest.mark.parametrize("window", [-1, 64, 333])
def test_capture_in_a_graph_of_the_caller(window: int) -> None:
    """Lengths are validated before the capture, not during it."""
    q, r, k, v = cached()
    used, out = torch.full((3,), 1000, dtype=torch.int32, device=DEVICE), torch.empty_like(q)

    def step() -> None:
        parallax_kernel.parallax_attn_with_kvcache(q, r, k, v, seqused_k=used, window_size=(window, 0), out=out)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ((1000, 1, 500), (64, 65, 999)):
        used.copy_(torch.tensor(lengths))
        q.copy_(torch.randn_like(q))
        graph.replay()
        options: Any = {"causal": True, "window_size": window if window > 0 else None}
        assert_close(out, reference_cached_forward(q, r, k, v, cache_seqlens=used, **options).out, "bf16")


def test_graphed_decodes_are_independent() -> None:
    inputs = cached()
    steps = [parallax_kernel.GraphedDecode(3, 8, 1000, H_kv=2, device=DEVICE) for _ in range(2)]
    steps.append(parallax_kernel.GraphedDecode(3, 8, kv_len=1000, H_kv=2, device=DEVICE))
    assert all(isinstance(step.graph, torch.cuda.CUDAGraph) for step in steps)
    for step in steps:
        for own, x in zip((step.q, step.r, step.k, step.v), inputs, strict=True):
            own.copy_(x)
    for lengths in (1000, [1, 999, 77], 400):
        outs = [step(cache_seqlens=lengths) for step in steps]
        used = torch.empty(3, dtype=torch.int32, device=DEVICE).copy_(torch.as_tensor(lengths))
        expected = reference_cached_forward(*inputs, cache_seqlens=used).out
        assert_close(outs[0], expected, "bf16")
        assert torch.equal(outs[0], outs[1])
        assert_close(outs[2], reference_cached_forward(*inputs).out, "bf16")
    with pytest.raises(ValueError, match="out of range"):
        steps[0](cache_seqlens=torch.tensor([1, 1001, 1], device=DEVICE))


# Against the original packages


@pytest.fixture(scope="module")
def untuned() -> Iterator[None]:
    """Let Triton's autotuners take their first config, since tuning the originals takes minutes."""
    from triton.runtime.autotuner import Autotuner

    before = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, *_: self.configs[:1]
    yield
    Autotuner.prune_configs = before


@pytest.fixture(scope="module")
def parallax(untuned: None) -> Any:
    package = pytest.importorskip("parallax")
    if not hasattr(tl, "make_block_ptr"):
        pytest.skip("the kernels of parallax-kernel need block pointers, which this Triton has not")
    return package


@pytest.fixture(scope="module")
def parallax_fla(untuned: None) -> Any:
    return pytest.importorskip("fla.ops.parallax")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_programs_pass_with_the_original_packages(program: Path, request: pytest.FixtureRequest) -> None:
    package = request.getfixturevalue("parallax_fla" if program.stem.startswith("fla") else "parallax")
    if program.stem in ("parallax_kernel_decoding", "parallax_kernel_serving") and not package.cute_decode_available:
        pytest.skip("its decode needs its cutedsl extra")
    if program.stem == "parallax_kernel_training":
        request.applymarker(pytest.mark.xfail(reason="its windows are wrong on some tiles of its autotuner's"))
    run_program(program, DEVICE, ours=False)


def test_statistics_are_interchangeable_with_parallax_kernel(parallax: Any) -> None:
    """Each backward accepts the other forward's. No window: its windowed kernels are right only for some tiles."""
    inputs = leaves(256, 256)
    raw, do = folded(*inputs), torch.randn(8, 256, 64, device=DEVICE).bfloat16()
    arguments = (64**-0.5, 2)
    theirs, our = parallax.parallax_fwd(*raw, *arguments), parallax_kernel.parallax_fwd(*raw, *arguments)
    for a, b in zip(theirs, our, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    assert_close(our[0], theirs[0].double(), "bf16")
    assert_close(our[1], theirs[1].double(), "bf16")
    assert_close(our[2].log2() + our[4], (theirs[2].log2() + theirs[4]).double(), "bf16")
    assert_close(our[3], theirs[3].double(), "bf16")
    expected = parallax.parallax_bwd(*raw, *theirs, do, *arguments)
    for result in (
        parallax_kernel.parallax_bwd(*raw, *our, do, *arguments),
        parallax_kernel.parallax_bwd(*raw, *theirs, do, *arguments),
        parallax.parallax_bwd(*raw, *our, do, *arguments),
    ):
        assert [x.dtype for x in result] == [x.dtype for x in expected]
        assert_gradients_close(result, [x.double() for x in expected], raw, do)


def test_training_agrees_with_parallax_kernel(parallax: Any) -> None:
    for seqlen_q, seqlen_kv in ((300, 300), (130, 300), (300, 130)):
        inputs = [x.detach().transpose(1, 2) for x in leaves(seqlen_q, seqlen_kv)]
        theirs, our = (package.parallax_func(*inputs) for package in (parallax, parallax_kernel))
        assert theirs.stride() == our.stride()
        assert_close(our, theirs.double(), "bf16")


def test_decode_agrees_with_parallax_kernel(parallax: Any) -> None:
    if not parallax.cute_decode_available:
        pytest.skip("its decode needs its cutedsl extra")
    inputs = cached()
    used = torch.tensor([1000, 1, 500], dtype=torch.int32, device=DEVICE)
    for options in ({}, {"window_size": (333, 0)}, {"window_size": 64, "seqused_k": used}, {"scale": 0.2}):
        theirs, our = (
            package.parallax_attn_with_kvcache(*inputs, **options) for package in (parallax, parallax_kernel)
        )
        assert_close(our, theirs.double(), "bf16")


def test_results_agree_with_fla(parallax_fla: Any) -> None:
    decoding = pytest.importorskip("fla.ops.parallax.decode")
    for options in ({}, {"window_size": 97}, {"scale": 0.2}):
        inputs = leaves(head_dim=100)
        do = torch.randn_like(inputs[0])
        theirs, our = (package.parallel_parallax(*inputs, **options) for package in (parallax_fla, fla))
        assert theirs.stride() == our.stride()
        assert_close(our, theirs.double(), "bf16")
        expected = torch.autograd.grad(theirs, inputs, do)
        assert_gradients_close(torch.autograd.grad(our, inputs, do), [x.double() for x in expected], inputs, do)
        assert_close(fla.naive_parallax(*inputs, **options), parallax_fla.naive_parallax(*inputs, **options), "bf16")
        for seqlen_q in (1, 40):
            rows = [inputs[0][:, -seqlen_q:], inputs[1][:, -seqlen_q:], *inputs[2:]]
            for start in (None, torch.tensor([0, 280], device=DEVICE)):
                theirs, our = (x.parallax_decode(*rows, **options, cache_start=start) for x in (decoding, fla))
                assert_close(our, theirs.double(), "bf16")
