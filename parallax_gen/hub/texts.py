"""The files of a hub package beside its code: build.toml, flake.nix, the card, a test."""

from __future__ import annotations

from collections.abc import Sequence

import parallax_gen
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.spec import KernelSpec

VERSION = 1  # of the functions of a package: its branch in the hub is v1
FIRST_LINE = "# Made by parallax-gen export --hub"

FLAKE = """{
  description = "Parallax attention, a kernel of the Hugging Face hub";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""


def build_toml(name: str, repo_id: str) -> str:
    """What kernel-builder builds: a package of Python files alone, for CUDA."""
    return f"""{FIRST_LINE}, {parallax_gen.__version__}
[general]
name = "{name}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = ["cuda"]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = ["json", "py"]
"""


def card(repo_id: str, specs: Sequence[KernelSpec], cards: Sequence[Gpu]) -> str:
    """The page of the package in the hub."""
    listed = "\n".join(f"- {spec}" for spec in specs)
    titles = ", ".join(gpu.title for gpu in cards)
    return f"""---
library_name: kernels
license: apache-2.0
---

# Parallax attention

Triton kernels of Parallax attention ([arXiv 2605.29157](https://arxiv.org/abs/2605.29157)): softmax attention minus a
learned correction by the covariance of keys and values, with probes r beside queries, keys and values. parallax_gen
{parallax_gen.__version__} rendered and tuned them; they are the kernels that it launches itself, and need torch 2.9 and
Triton 3.5 or newer.

## Use

```python
import torch
from kernels import get_kernel

attention = get_kernel("{repo_id}", version={VERSION}, trust_remote_code=True)
print(*attention.specs(), sep="\\n")

# q, r: (batch, seqlen, heads, head_dim); k, v: (batch, seqlen, kv_heads, head_dim)
out = attention.parallax_attn_func(q, r, k, v, causal=True)

# One new query per sequence over a cache: q, r (batch, 1, heads, head_dim)
out = attention.parallax_attn_with_kvcache(q, r, k_cache, v_cache, cache_seqlens=lengths)
```

Functions: `parallax_attn_func` and `parallax_attn_varlen_func`, with gradients, `parallax_attn_with_kvcache`,
`kvcache_workspace_size`, `merge_states`, `batch_invariant`. Each is one operator for torch.compile; their docstrings
have all arguments. Layers, for `use_kernel_forward_from_hub`: `layers.ParallaxAttention` with the forward (q, r, k, v),
and `layers.ParallaxAttentionWithKVCache`. Both read `causal`, `window_size`, `softmax_scale` and `softcap` of the layer
that they replace. `attn_implementation` of transformers has no argument for r.

## Kernels

{listed}

Other calls raise an error that names these. For {titles}; on another card the most similar one's kernels are used, with
a warning, if they fit.

`configs/kernels.json` lists the kernels; the other files there say which of them a call gets, by the card, the size of
the call, and the versions of Triton and ptxas.

Without a GPU, kernels run in Triton's interpreter if `TRITON_INTERPRET=1` is set: slowly, and not in bf16.
"""


CONFTEST = '''"""Declares the mark of the tests that kernel-builder runs."""


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels_ci: kernel-builder runs it")
'''


def test_file(module: str) -> str:
    """The tests that kernel-builder runs."""
    return _TEST.replace("MODULE", module)


_TEST = '''"""What the kernels compute, against the definition in fp64. With TRITON_INTERPRET=1 they need no GPU."""

import os

import pytest
import torch

import MODULE as attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {"bf16": 3e-2, "fp16": 5e-3, "fp32": 1e-3}
KV_HEADS, BATCH, KEYS = 2, 2, 37

pytestmark = [
    pytest.mark.kernels_ci,
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a CUDA device, or TRITON_INTERPRET=1"),
]
PLAIN = {"forward": [], "preprocess": [], "dkdv": [], "dqdr": [], "decode": [], "decode_varlen": []}
for spec in attention.specs():
    is_plain = not (spec.varlen or spec.window or spec.softcap or spec.cache_dtype or spec.batch_invariant)
    is_right = spec.dtype in DTYPES and not (INTERPRETED and spec.dtype == "bf16")  # the interpreter's bf16 is wrong
    if is_plain and is_right:
        PLAIN[spec.op].append(spec)


def tensors(spec, queries, keys):
    generator = torch.Generator().manual_seed(0)
    heads = KV_HEADS * spec.group
    sizes = [(BATCH, n, h, spec.head_dim) for n, h in ((queries, heads), (queries, heads), (keys, KV_HEADS))]
    made = [torch.randn(size, generator=generator) for size in (*sizes, sizes[2])]
    made[1] *= 0.3
    return [x.to(DEVICE, DTYPES[spec.dtype]) for x in made]


def definition(q, r, k, v, causal=False, lengths=None):
    q, r, k, v = (x.double().transpose(1, 2) for x in (q, r, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores, t = q @ k.mT * q.shape[-1] ** -0.5, r @ k.mT
    key = torch.arange(k.shape[2], device=q.device)
    seen = key <= torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2] if causal else key >= 0
    if lengths is not None:
        seen = (key < lengths[:, None])[:, None, None, :]
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return ((p * (1 + (p * t).sum(-1, keepdim=True) - t)) @ v).transpose(1, 2)


def check(actual, expected, spec):
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[spec.dtype], error


@pytest.mark.parametrize("spec", PLAIN["forward"], ids=str)
def test_forward(spec):
    q, r, k, v = tensors(spec, KEYS, KEYS)
    with torch.no_grad():
        out = attention.parallax_attn_func(q, r, k, v, causal=spec.causal, return_stats=spec.stats)
    check(out[0] if spec.stats else out, definition(q, r, k, v, spec.causal), spec)


@pytest.mark.parametrize("spec", PLAIN["dkdv"], ids=str)
def test_gradients(spec):
    inputs = [x.requires_grad_() for x in tensors(spec, KEYS, KEYS)]
    out = attention.parallax_attn_func(*inputs, causal=spec.causal)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    expected = torch.autograd.grad(definition(*inputs, spec.causal), inputs, do.double())
    for actual, gradient in zip(torch.autograd.grad(out, inputs, do), expected):
        check(actual, gradient, spec)


@pytest.mark.parametrize("spec", PLAIN["decode"], ids=str)
def test_decode(spec):
    q, r, k, v = tensors(spec, 1, KEYS)
    check(attention.parallax_attn_with_kvcache(q, r, k, v), definition(q, r, k, v), spec)


@pytest.mark.parametrize(
    "spec",
    [spec for spec in PLAIN["decode_varlen"] if not (spec.multi_token or spec.leftpad or spec.stats)],
    ids=str,
)
def test_decode_of_own_lengths(spec):
    q, r, k, v = tensors(spec, 1, KEYS)
    lengths = torch.tensor([KEYS - 9, KEYS], dtype=torch.int32, device=DEVICE)
    options = {"cache_seqlens": lengths}
    caches = k, v
    if spec.page_size:
        pages = -(-KEYS // spec.page_size)
        padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pages * spec.page_size - KEYS)) for x in (k, v)]
        order = torch.randperm(BATCH * pages, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        caches = [torch.empty(BATCH * pages, spec.page_size, *x.shape[2:]).to(x) for x in (k, v)]
        for cache, x in zip(caches, padded):
            cache[order] = x.reshape(cache.shape)
        options["page_table"] = order.int().view(BATCH, pages)
    out = attention.parallax_attn_with_kvcache(q, r, *caches, **options)
    check(out, definition(q, r, k, v, lengths=lengths), spec)


def test_other_calls_name_what_there_is():
    q = torch.zeros(1, 4, 2, 8, device=DEVICE)
    with pytest.raises(attention.ArgumentError, match="one of this package"):
        attention.parallax_attn_with_kvcache(q[:, :1], q[:, :1], q, q, softcap=3.0)
'''
