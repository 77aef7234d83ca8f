"""torch's scaled_dot_product_attention with two of its backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallax_gen.bench.baselines.base import (
    NO_LENGTHS,
    AttentionCall,
    Baseline,
    Step,
    gradient_of_output,
    leaves,
    refuse_unsupported,
)
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from parallax_gen.codegen.abi import Inputs


@dataclass(frozen=True)
class Sdpa:
    """scaled_dot_product_attention with one backend, named as in torch's SDPBackend."""

    backend: str

    def attention(self, spec: KernelSpec, q: Tensor, k: Tensor, v: Tensor) -> AttentionCall:
        """Inputs are (batch, seqlen, heads, head_dim). Raises NotImplementedError."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        refuse_unsupported(spec, lengths=NO_LENGTHS, varlen=NO_LENGTHS, window="no window")
        if spec.causal and q.shape[1] != k.shape[1]:
            raise NotImplementedError("its causal mask is aligned to the first key")
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        backend = getattr(SDPBackend, self.backend)

        def call() -> Tensor:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(q, k, v, is_causal=spec.causal, enable_gqa=spec.group > 1)
            return out.transpose(1, 2)

        return call

    def call(self, spec: KernelSpec, x: Inputs) -> AttentionCall:
        return self.attention(spec, x.q, x.k, x.v)

    def step(self, spec: KernelSpec, x: Inputs) -> Step:
        q, k, v = leaves(x.q, x.k, x.v)
        return Step(self.attention(spec, q, k, v), (q, k, v), gradient_of_output(x))


def _cudnn_version() -> str:
    import torch

    return f"cuDNN {torch.backends.cudnn.version()}"


FLASH, CUDNN = Sdpa("FLASH_ATTENTION"), Sdpa("CUDNN_ATTENTION")
BASELINES = (
    Baseline("SDPA flash", FLASH.call, FLASH.call, FLASH.step, softmax=True),
    Baseline("SDPA cuDNN", CUDNN.call, CUDNN.call, CUDNN.step, softmax=True, setting=_cudnn_version),
)
