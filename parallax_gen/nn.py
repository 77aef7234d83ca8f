"""Parallax attention as a layer: `parallax_gen.nn.ParallaxAttention`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.spec import LARGEST_HEAD_DIM
from parallax_gen.runtime.checks import check_numbers
from parallax_gen.runtime.functional import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.runtime.invariance import check_batch_invariant
from parallax_gen.runtime.requests import OPTIONS

NORM_EPS = 1e-6  # torch's default, the dtype's own epsilon, is as large as 1/128 in bf16


class ZeroInitLinear(nn.Linear):
    """nn.Linear initialised to zero: with it as r_proj, Parallax attention starts as softmax attention.

    reset_parameters sets the zeros, so they survive every way of initialising modules: FSDP's initialisation of modules
    on the "meta" device, in any order of parents and children, and a user's own loop.
    """

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ParallaxAttention(nn.Module):
    """Self-attention with probes r: q, r, k and v are projections of x; o_proj projects the heads' outputs.

    hidden_size    width of x and of the output
    num_heads      query heads
    num_kv_heads   key and value heads, a divisor of num_heads; num_heads by default
    head_dim       a multiple of 8 up to 256; hidden_size / num_heads by default
    causal         whether a token sees only itself and earlier tokens
    window_size    with causal: a token sees at most this many tokens, itself and those right before it
    qk_norm        RMS norms over each head of q and of k, each with a gain of head_dim elements. r has no norm: at r =
                   0, where training starts from softmax attention, the norm's gradient would be unbounded
    rope_theta     rotary embedding of q, r and k, at frequencies rope_theta^(-2i/head_dim) for the pairs
                   (i, i + head_dim/2) of a head; None for no rotation
    bias           whether the projections have a bias
    zero_init_r    start with r = 0, as softmax attention: with the other weights of a trained Transformer the layer
                   computes the same function. Gradients reach r_proj from the first step. r_proj is a `ZeroInitLinear`,
                   whose reset_parameters sets zeros; code that initialises every nn.Linear itself must skip it
    softmax_scale  scale of q·k; 1/√head_dim by default
    softcap        cap of the scores, as in `parallax_attn_func`; None for no cap
    batch_invariant  as in `parallax_attn_func`; None for the process's mode

    Submodules: q_proj, r_proj (hidden_size -> num_heads * head_dim), k_proj, v_proj (-> num_kv_heads * head_dim),
    o_proj (num_heads * head_dim -> hidden_size), and q_norm, k_norm with qk_norm.
    Raises ArgumentError, naming the argument.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool = True,
        window_size: int | None = None,
        qk_norm: bool = False,
        rope_theta: float | None = None,
        bias: bool = False,
        zero_init_r: bool = False,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        batch_invariant: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = (("hidden_size", hidden_size), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads))
        for name, size in sizes:
            if size < 1:
                raise ArgumentError(name, size, "1 or more")
        if num_heads % num_kv_heads:
            raise ArgumentError("num_kv_heads", num_kv_heads, f"a divisor of num_heads, {num_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ArgumentError(
                "head_dim", None, f"a number, because num_heads {num_heads} does not divide hidden_size {hidden_size}"
            )
        check_numbers(causal, window_size, softmax_scale, softcap)
        check_batch_invariant(batch_invariant)
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        if head_dim % 8 or not 0 < head_dim <= LARGEST_HEAD_DIM:
            raise ArgumentError("head_dim", head_dim, f"a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.causal = causal
        self.window_size = window_size
        self.rope_theta = rope_theta
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.batch_invariant = batch_invariant
        self.zero_init_r = zero_init_r

        def linear(in_features: int, out_features: int, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
            return kind(in_features, out_features, bias=bias, device=device, dtype=dtype)

        def norm() -> nn.Module:
            return nn.RMSNorm(head_dim, NORM_EPS, device=device, dtype=dtype) if qk_norm else nn.Identity()

        self.q_proj = linear(hidden_size, num_heads * self.head_dim)
        r_kind = ZeroInitLinear if zero_init_r else nn.Linear
        self.r_proj = linear(hidden_size, num_heads * self.head_dim, r_kind)
        self.k_proj = linear(hidden_size, num_kv_heads * self.head_dim)
        self.v_proj = linear(hidden_size, num_kv_heads * self.head_dim)
        self.o_proj = linear(num_heads * self.head_dim, hidden_size)
        self.q_norm, self.k_norm = norm(), norm()

    def reset_parameters(self) -> None:
        """Initialise all weights again; with zero_init_r, r_proj is zero."""
        for module in self.children():
            if isinstance(module, nn.Linear | nn.RMSNorm):
                module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        position_offset: int | Tensor = 0,
    ) -> Tensor:
        """The layer's output, like x.

        x                (batch, seqlen, hidden_size); or packed sequences, (total, hidden_size)
        cu_seqlens       packed: (batch + 1,) int32 on x's device: the start of each sequence, then total
        max_seqlen       packed: at least the longest sequence's length
        position_offset  with rope_theta: the first token's position; an int tensor of shape (batch, 1) for one position
                         per sequence, if they are not packed
        """
        if x.dim() != (3 if cu_seqlens is None else 2):
            allowed = "(batch, seqlen, hidden_size), or (total, hidden_size) and cu_seqlens"
            raise ArgumentError("x", f"shape {tuple(x.shape)}", allowed)
        q, r, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.r_proj, self.k_proj, self.v_proj)
        )
        q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        if self.rope_theta is not None:
            positions = _positions(x, cu_seqlens) + position_offset
            cos, sin = _cos_sin(positions, self.head_dim, self.rope_theta)
            q, r, k = (_rotate(heads, cos, sin) for heads in (q, r, k))
        options: dict[str, Any] = {name: getattr(self, name) for name in (*OPTIONS, "batch_invariant")}
        if cu_seqlens is None:
            out = parallax_attn_func(q, r, k, v, **options)
        elif max_seqlen is None:
            raise ArgumentError("max_seqlen", None, "an int, at least the longest sequence's length, with cu_seqlens")
        else:
            lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
            out = parallax_attn_varlen_func(q, r, k, v, *lengths, **options)
        return cast("Tensor", self.o_proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        names = ["num_heads", "num_kv_heads", "head_dim", "causal", "window_size", "rope_theta"]
        names += [name for name in ("softmax_scale", "softcap", "batch_invariant") if getattr(self, name) is not None]
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _normed(norm: nn.Module, heads: Tensor) -> Tensor:
    """Normalise in the gain's dtype, which may differ under autocast. torch has no fast norm for mixed dtypes."""
    if not isinstance(norm, nn.RMSNorm):
        return heads
    return cast("Tensor", norm(heads.to(norm.weight.dtype)).to(heads.dtype))


def _positions(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each token's position in its sequence: (seqlen,), or (total,) if packed. Computed on the device."""
    tokens = torch.arange(x.shape[-2], device=x.device, dtype=torch.int32)
    if cu_seqlens is None:
        return tokens
    # A token's sequence ends at the first end after the token. Tokens after all ends belong to the last sequence.
    sequence = torch.bucketize(tokens, cu_seqlens[1:-1], right=True)
    return tokens - cu_seqlens[sequence]


def _cos_sin(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (*positions' shape, 1, head_dim / 2), in fp32: bf16 cannot represent large positions."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None, None].float() * theta ** (-pairs / head_dim)
    return angles.cos(), angles.sin()


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + head_dim/2) of heads (..., seqlen, heads, head_dim) by its angle."""
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
