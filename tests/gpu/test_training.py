"""Training steps on a card through the public functions: output and gradients against the fp64 oracle.

Most tests share one spec (that of `leaves`) and one bucket, because compiling takes most of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from assertions import assert_close
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from training_inputs import Inputs, leaves, normal
from triton.runtime.jit import JITFunction

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.nn import ParallaxAttention
from parallax_gen.oracle.accuracy import errors, gradient_term_sizes, tolerance
from parallax_gen.oracle.reference import (
    reference_backward,
    reference_forward,
    reference_varlen_backward,
    reference_varlen_forward,
)

pytestmark = pytest.mark.gpu

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def assert_gradients_close(
    grads: Any, expected: Any, inputs: Inputs, do: Tensor, name: str, window_size: int | None = None
) -> None:
    """Twice the forward's tolerance: besides p and p·t a backward rounds g^s and g^t, and b − T is the difference of
    two sums over the saved o and v̄, each rounded to the input dtype.

    For a row that sees few keys b − T is only this rounding error, scaled by |t|: up to 6 times a gradient's natural
    size for |t| up to 4. (training_steps.py allows 12 at half the tolerance.)
    """
    few_keys_factor = 6.0 if window_size is not None and window_size < 16 else 1.0
    sizes = gradient_term_sizes(*[x.detach() for x in inputs], do)
    for what, x, grad, ref, natural in zip(("dq", "dr", "dk", "dv"), inputs, grads, expected, sizes, strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
        result = errors(grad, ref, few_keys_factor * float(natural))
        assert result.relative <= 2 * tolerance(name), (what, result)
        assert result.worst <= 10 * tolerance(name), (what, result)


def check(inputs: Inputs, name: str | None = None, recompute_v_mean: bool = False, **options: Any) -> None:
    """Check a dense training step, and a call without gradients."""
    name = name or NAMES[inputs[0].dtype]
    expected = reference_forward(*[x.detach() for x in inputs], **options)
    out = parallax_attn_func(*inputs, **options, recompute_v_mean=recompute_v_mean)
    assert isinstance(out, Tensor)
    assert_close(out, expected.out, name)
    do = torch.randn_like(out)
    target = reference_backward(*inputs, do, **options)
    grads = torch.autograd.grad(out, inputs, do)
    assert_gradients_close(grads, target, inputs, do, name, options.get("window_size"))
    with torch.no_grad():
        assert_close(parallax_attn_func(*inputs, **options), expected.out, name)


def check_packed(inputs: Inputs, lengths_q: list[int], lengths_k: list[int], longest: int, **options: Any) -> None:
    starts = [torch.tensor([0, *x], device="cuda").cumsum(0).int() for x in (lengths_q, lengths_k)]
    out = parallax_attn_varlen_func(*inputs, *starts, longest, longest, **options)
    assert isinstance(out, Tensor)
    assert_close(out, reference_varlen_forward(*[x.detach() for x in inputs], *starts, **options).out, "bf16")
    do = torch.randn_like(out)
    expected = reference_varlen_backward(*inputs, do, *starts, **options)
    assert_gradients_close(torch.autograd.grad(out, inputs, do), expected, inputs, do, "bf16")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlens", [(300, 300), (257, 350), (350, 257), (1, 300), (300, 1)])
def test_lengths(seqlens: tuple[int, int], causal: bool) -> None:
    check(leaves((2, seqlens[0]), (2, seqlens[1])), causal=causal)


@pytest.mark.parametrize("window_size", [1, 97, 200, 256, 257, 513, 10**6])
@pytest.mark.parametrize("seqlens", [(300, 300), (260, 350), (350, 260)])
def test_windows(seqlens: tuple[int, int], window_size: int) -> None:
    check(leaves((2, seqlens[0]), (2, seqlens[1])), causal=True, window_size=window_size)


def test_windows_of_a_long_sequence() -> None:
    for window_size in (200, 513, 1000):
        check(leaves((1, 1300), (1, 1300)), causal=True, window_size=window_size, softmax_scale=0.2)


@pytest.mark.parametrize("head_dim", [32, 72, 80, 96, 112, 128, 160, 192, 256])
def test_head_dims(head_dim: int) -> None:
    check(leaves((1, 300), (1, 300), head_dim=head_dim), causal=True)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_groups(group: int) -> None:
    check(leaves((2, 300), (2, 300), heads=2 * group), causal=True)


@pytest.fixture
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("recompute_v_mean", [False, True])
def test_dtypes(dtype: torch.dtype, recompute_v_mean: bool) -> None:
    check(leaves((2, 300), (2, 300), dtype=dtype), causal=True, recompute_v_mean=recompute_v_mean)


@pytest.mark.usefixtures("_tf32")
def test_tf32() -> None:
    inputs = leaves((2, 300), (2, 300), dtype=torch.float32)
    check(inputs, "tf32", causal=True)
    rounded = parallax_attn_func(*inputs, causal=True)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not torch.equal(rounded, parallax_attn_func(*inputs, causal=True))  # the TF32 switch is read in every call


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window_size": 97}, {}])
def test_packed_sequences(options: dict[str, Any]) -> None:
    lengths_q, lengths_k = [300, 0, 1, 257, 0, 31, 100, 0], [300, 7, 5, 130, 0, 200, 0, 0]
    check_packed(leaves((sum(lengths_q),), (sum(lengths_k),)), lengths_q, lengths_k, 300, **options)


@pytest.mark.parametrize("padding", [3, 700])
def test_padding_rows_are_0(padding: int) -> None:
    """Padding holds NaN and torch.empty returns NaN; all other rows are bitwise equal to those without padding."""
    lengths = [40, 0, 300]
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    total = sum(lengths)
    inputs = leaves((total,), (total,))
    do = torch.randn_like(inputs[0])
    target = parallax_attn_varlen_func(*inputs, starts, starts, 300, 300, causal=True, return_stats=True)
    target = (*target, *torch.autograd.grad(target[0], inputs, do))
    wider = [pad(x.detach(), (0, 0, 0, 0, 0, padding), value=torch.nan) for x in (*inputs, do)]
    for x in wider[:4]:
        x.requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        result = parallax_attn_varlen_func(*wider[:4], starts, starts, 300, 300, causal=True, return_stats=True)
        result = (*result, *torch.autograd.grad(result[0], wider[:4], wider[4]))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x, y in zip(("out", "lse", "t_mean", "v_mean", "dq", "dr", "dk", "dv"), result, target, strict=True):
        by_row, expected = (z.transpose(0, 1) if name in ("lse", "t_mean") else z for z in (x, y))
        assert torch.equal(by_row[:total], expected), name
        assert (by_row[total:] == (-torch.inf if name == "lse" else 0)).all(), name


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # warns that it is a prototype
def test_a_new_packing_does_not_compile_or_synchronise(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(lengths: list[int]) -> None:
        check_packed(leaves((sum(lengths),), (sum(lengths),)), lengths, lengths, 300, causal=True)

    compiled = []
    compile_one = JITFunction._do_compile

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.append(self.__name__)
        return compile_one(self, *args, **kwargs)

    step([300, 20, 0, 177])
    monkeypatch.setattr(JITFunction, "_do_compile", record)
    step([299, 16, 33, 1])
    step([0, 300, 0, 64])
    step([128, 128, 128, 128])
    assert compiled == []

    inputs = leaves((512,), (512,))
    starts = torch.tensor([0, 128, 256, 384, 512], device="cuda", dtype=torch.int32)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = parallax_attn_varlen_func(*inputs, starts, starts, 300, 300, causal=True)
        assert isinstance(out, Tensor)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_strides_from_layers() -> None:
    """A fused projection, heads before the sequence, and kv heads expanded to query heads."""
    fused_projection = normal(2, 300, 8, 64).requires_grad_()
    heads_first = normal(2, 2, 300, 64).requires_grad_()
    shared = normal(2, 300, 1, 64).requires_grad_()
    q, r, k, v = (
        fused_projection[:, :, :4],
        fused_projection[:, :, 4:] / 8,
        heads_first.transpose(1, 2),
        shared.expand(2, 300, 2, 64),
    )
    inputs = (fused_projection, heads_first, shared)
    out = parallax_attn_func(q, r, k, v, causal=True)
    expected = reference_forward(q, r, k, v, causal=True).out
    assert isinstance(out, Tensor)
    assert_close(out, expected, "bf16")
    # The output gradient has stride 0. The reference's gradients go through the same views and the division again.
    result = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    for grad, ref in zip(result, torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert errors(grad, ref.double()).relative <= 2 * tolerance("bf16")


def test_only_needed_gradients_are_computed() -> None:
    inputs = leaves((2, 300), (2, 300))
    out = parallax_attn_func(*inputs, causal=True)
    assert isinstance(out, Tensor)
    all_gradients = torch.autograd.grad(out.sum(), inputs)
    for needed in ((0,), (1, 2), (3,)):
        arguments = [x.detach().requires_grad_(place in needed) for place, x in enumerate(inputs)]
        out = parallax_attn_func(*arguments, causal=True)
        assert isinstance(out, Tensor)
        out.sum().backward()
        for place, x in enumerate(arguments):
            assert (x.grad is not None) == (place in needed)
            assert x.grad is None or torch.equal(x.grad, all_gradients[place])  # and deterministic


def test_r_zero_is_softmax_attention_and_so_are_its_gradients() -> None:
    q, r, k, v = leaves((2, 300), (2, 300))
    r = torch.zeros_like(r).requires_grad_()
    out = parallax_attn_func(q, r, k, v, causal=True)
    assert isinstance(out, Tensor)
    do = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, r, k, v), do)
    heads_first = [x.double().transpose(1, 2) for x in (q, k, v)]
    softmax = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert_close(out, softmax, "bf16")
    dq, dk, dv = torch.autograd.grad(softmax, (q, k, v), do.double())
    dr = reference_backward(q, r, k, v, do, causal=True).dr
    assert dr.abs().max() > 0
    assert_gradients_close(grads, (dq.double(), dr, dk.double(), dv.double()), (q, r, k, v), do, "bf16")


def test_a_layer_that_starts_as_softmax_attention_learns_r() -> None:
    layer = ParallaxAttention(
        256, 4, 2, rope_theta=1e4, qk_norm=True, zero_init_r=True, device="cuda", dtype=torch.bfloat16
    )
    x = normal(2, 300, 256)
    layer(x).sum().backward()
    assert layer.r_proj.weight.grad is not None
    assert layer.r_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_size": 97}])
def test_extreme_inputs_give_no_nan(options: dict[str, Any]) -> None:
    """Probes eight times as large, and a first key that outweighs all others in score and in t."""
    q, r, k, v = leaves((2, 300), (2, 300))
    with torch.no_grad():
        r.mul_(8)
        k[:, 0] = 30 * q[:, -1, ::2]
    out = parallax_attn_func(q, r, k, v, **options)
    assert isinstance(out, Tensor)
    grads = torch.autograd.grad(out, (q, r, k, v), torch.randn_like(out))
    assert all(bool(x.isfinite().all()) for x in (out, *grads))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    inputs = leaves((2, 300), (2, 300))

    def block(*x: Tensor) -> Tensor:
        out = parallax_attn_func(*x, causal=True)
        assert isinstance(out, Tensor)
        return out * 2

    do = torch.randn_like(inputs[0])
    expected = torch.autograd.grad(block(*inputs), inputs, do)
    checkpoint(block, *inputs, use_reentrant=use_reentrant).backward(do)
    for x, ref in zip(inputs, expected, strict=True):
        assert x.grad is not None
        assert torch.equal(x.grad, ref)


def test_autocast() -> None:
    inputs = leaves((2, 300), (2, 300), dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out = parallax_attn_func(*inputs, causal=True)
    assert isinstance(out, Tensor)
    assert out.dtype == torch.bfloat16
    cast = [x.bfloat16() for x in inputs]
    assert torch.equal(out, parallax_attn_func(*cast, causal=True))
    do = torch.randn_like(out)
    expected = reference_backward(*cast, do, causal=True)
    assert_gradients_close(torch.autograd.grad(out, inputs, do), expected, inputs, do, "bf16")


@pytest.mark.filterwarnings("ignore")  # warnings of torch's compiler
def test_compiled_in_one_graph_for_every_length() -> None:
    torch._dynamo.reset()
    layer = ParallaxAttention(256, 4, 2, device="cuda", dtype=torch.bfloat16)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seqlen in (300, 257, 350):
        x = normal(2, seqlen, 256).requires_grad_()
        torch._dynamo.mark_dynamic(x, 1)
        result, expected = compiled(x), layer(x)
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
        do = torch.randn_like(expected)
        grads = [torch.autograd.grad(y, (x, *layer.parameters()), do) for y in (result, expected)]
        for a, b in zip(*grads, strict=True):
            assert errors(a, b.double()).relative < 2 * tolerance("bf16")
    assert counter.frame_count == 1
    torch._dynamo.reset()


def last_of_a_batch(inputs: Inputs, out: Tensor, grads: tuple[Tensor, ...], do: Tensor) -> None:
    """Check the last two sequences of a batch."""
    some = tuple(x.detach()[-2:] for x in inputs)
    assert_close(out[-2:], reference_forward(*some, causal=True).out, "bf16")
    expected = reference_backward(*some, do[-2:], causal=True)
    assert_gradients_close([x[-2:] for x in grads], expected, some, do[-2:], "bf16")  # type: ignore[arg-type]


def test_more_sequences_times_heads_than_65535() -> None:
    inputs = leaves((17_500, 33), (17_500, 33))
    out = parallax_attn_func(*inputs, causal=True)
    assert isinstance(out, Tensor)
    do = torch.randn_like(out)
    last_of_a_batch(inputs, out, torch.autograd.grad(out, inputs, do), do)


def enough_memory(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB of free memory")


def test_tensors_of_more_than_2_31_elements() -> None:
    enough_memory(50)
    batch = 2**31 // (33 * 16 * 64) + 10
    inputs = leaves((batch, 33), (batch, 33), heads=16, kv_heads=8)
    assert inputs[0].numel() > 2**31
    out = parallax_attn_func(*inputs, causal=True)
    assert isinstance(out, Tensor)
    do = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, do)
    last_of_a_batch(inputs, out, grads, do)


def test_row_offsets_past_2_31_elements() -> None:
    enough_memory(12)
    stride = 2**23
    memory = torch.empty(300 * stride, device="cuda", dtype=torch.bfloat16)
    inputs = []
    for place, x in enumerate(leaves((1, 300), (1, 300))):
        _, seqlen, heads, head_dim = x.shape
        far = memory[place * 4096 :].as_strided((1, seqlen, heads, head_dim), (0, stride, head_dim, 1))
        inputs.append(far.copy_(x.detach()).requires_grad_())
    q, r, k, v = inputs
    check((q, r, k, v), causal=True)
    check((q, r, k, v))
