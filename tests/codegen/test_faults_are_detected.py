"""The checks of kernels in the interpreter detect faults: each test changes one expression of a rendered kernel."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from interpreter_cases import DECODE, DKDV, DQDR, FORWARD, GPU, inputs_of
from strategies import Kernel

from parallax_gen.codegen.render import KernelSource, render
from parallax_gen.ops.preprocess import PreprocessConfig
from parallax_gen.oracle import verify
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("gpu_arithmetic"),
    # A faulty kernel may compute anything; and a row without keys divides by zero.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

FORWARD_KERNEL = Kernel(KernelSpec("forward", 64, "fp16", group=2, causal=True, stats=True), FORWARD)
WINDOW_KERNEL = Kernel(KernelSpec("forward", 64, "fp16", group=2, causal=True, window=True), FORWARD)
FIXED_REFERENCE_KERNEL = Kernel(replace(WINDOW_KERNEL.spec, dtype="bf16"), replace(FORWARD, SOFTMAX="fixed_reference"))
VARLEN_KERNEL = Kernel(
    KernelSpec("forward", 80, "fp16", group=2, varlen=True), replace(FORWARD, HEAD_DIM_LAYOUT="chunked")
)
PREPROCESS_KERNEL = Kernel(KernelSpec("preprocess", 64, "fp16"), PreprocessConfig(BLOCK_M=16, num_warps=4))
DKDV_KERNEL = Kernel(KernelSpec("dkdv", 64, "fp16", group=2, causal=True, window=True), DKDV)
DQDR_KERNEL = Kernel(KernelSpec("dqdr", 64, "fp16", group=2, causal=True, window=True), DQDR)
DECODE_KERNEL = Kernel(KernelSpec("decode", 64, "fp16", group=12), replace(DECODE, NUM_SPLITS=4))
SOFTCAP_KERNEL = Kernel(KernelSpec("forward", 64, "fp16", causal=True, softcap=True), FORWARD)
SOFTCAP_DKDV_KERNEL = Kernel(KernelSpec("dkdv", 64, "fp16", causal=True, softcap=True), DKDV)
SOFTCAP_DQDR_KERNEL = Kernel(KernelSpec("dqdr", 64, "fp16", causal=True, softcap=True), DQDR)
SOFTCAP_DECODE_KERNELS = {
    "decode": KernelSpec("decode", 64, "fp16", group=2, softcap=True),
    "lengths": KernelSpec("decode_varlen", 64, "fp16", group=2, softcap=True),
    "pages": KernelSpec("decode_varlen", 64, "fp16", group=2, page_size=16, softcap=True),
    "8-bit caches": KernelSpec("decode_varlen", 64, "fp16", group=2, cache_dtype="e4m3", softcap=True),
    "prompts": KernelSpec("decode_varlen", 64, "fp16", 2, causal=True, multi_token=True, softcap=True),
}
# Faults that must be detected: (kernel, original text, faulty text).
FAULTS = [
    pytest.param(SOFTCAP_KERNEL, "        s = _tanh(s * cap_scale)", "        s = s * cap_scale", id="no cap"),
    pytest.param(SOFTCAP_DKDV_KERNEL, " * slope", "", id="a cap without its derivative"),
    pytest.param(SOFTCAP_DQDR_KERNEL, " * slope", "", id="a cap without its derivative in dq"),
    *(
        pytest.param(Kernel(spec, DECODE), "s = _tanh(s * cap_scale)", "s = s * cap_scale", id=f"no cap, {name}")
        for name, spec in SOFTCAP_DECODE_KERNELS.items()
    ),
    pytest.param(FORWARD_KERNEL, "<= last_key", "< last_key", id="causal mask off by one"),
    pytest.param(
        FORWARD_KERNEL,
        "causal_offset = seqlen_kv - seqlen_q",
        "causal_offset = 0",
        id="causal mask aligned to the start",
    ),
    pytest.param(FORWARD_KERNEL, "BLOCK_N > unmasked_end", "BLOCK_N > seqlen_kv", id="mask in the last block only"),
    pytest.param(FORWARD_KERNEL, "d2 = d2 * alpha", "d2 = d2", id="d2 not rescaled"),
    pytest.param(FORWARD_KERNEL, "pt = p * t", "pt = p", id="no probes"),
    pytest.param(FORWARD_KERNEL, "tl.sum(pt, 1)", "tl.sum(p, 1)", id="no probes in t_mean"),
    pytest.param(FORWARD_KERNEL, "pt - p * t_mean_new[:, None]", "pt", id="t not centered"),
    pytest.param(FORWARD_KERNEL, " + shift[:, None] * o1", "", id="a center that moves without o2"),
    pytest.param(FORWARD_KERNEL, "tl.range(0, key_end", "tl.range(1, key_end", id="the first key left out"),
    pytest.param(FORWARD_KERNEL, "(o1 - o2)", "o1", id="softmax attention"),
    pytest.param(FORWARD_KERNEL, "softmax_scale * LOG2_E", "softmax_scale", id="2 to the power, not e"),
    pytest.param(FORWARD_KERNEL, "* LN_2", "", id="lse in bits"),
    pytest.param(FORWARD_KERNEL, "head // GROUP", "head % (heads // GROUP)", id="heads dealt out in turn"),
    pytest.param(
        FORWARD_KERNEL,
        "t_mean, mask=mask_m",
        "t_mean, mask=offs_m + 1 < seqlen_q",
        id="last row's t_mean not written",
    ),
    pytest.param(FIXED_REFERENCE_KERNEL, " + shift[:, None] * o1", "", id="a center that moves without a stacked o2"),
    pytest.param(WINDOW_KERNEL, "tl.range(key_begin, key_end", "tl.range(key_begin + 1, key_end", id="no first key"),
    pytest.param(WINDOW_KERNEL, "| (start_n < unmasked_begin)", "", id="window masked in the last blocks only"),
    pytest.param(
        WINDOW_KERNEL,
        "BLOCK_M + causal_offset - window_size",
        "causal_offset - window_size + 1",
        id="bounded by the first row",
    ),
    pytest.param(
        WINDOW_KERNEL, "> last_key[:, None] - window_size", ">= last_key[:, None] - window_size", id="a key too many"
    ),
    pytest.param(VARLEN_KERNEL, "seq_start_k * stride_kn", "seq_start_q * stride_kn", id="keys of another sequence"),
    pytest.param(VARLEN_KERNEL, "acc=s)", "acc=s * 0.0)", id="the first chunk lost"),
    pytest.param(PREPROCESS_KERNEL, "1.0 + t_mean", "t_mean", id="no 1 beside the mean of t"),
    pytest.param(PREPROCESS_KERNEL, 'float("inf"), lse', "0.0, lse", id="rows without keys take part"),
    pytest.param(DKDV_KERNEL, "dv *= 1.0 / softmax_scale", "dv *= 1.0", id="dv scaled"),
    pytest.param(DKDV_KERNEL, "- w * dt", "", id="covariance left out of dk"),
    pytest.param(DKDV_KERNEL, "tl.range(0, GROUP)", "tl.range(0, 1)", id="one head of the group"),
    pytest.param(
        DKDV_KERNEL,
        "BLOCK_N - 1 - causal_offset + window_size",
        "- causal_offset + window_size",
        id="rows that see the last key",
    ),
    pytest.param(DKDV_KERNEL, "last_key - window_size", "last_key - window_size - 1", id="a row too many"),
    pytest.param(DQDR_KERNEL, "w_bias[:, None] - t * softmax_scale", "w_bias[:, None] - t", id="t not scaled in dq"),
    pytest.param(DQDR_KERNEL, "p * c[:, None] - w * dt", "-w * dt", id="c left out of dq"),
    pytest.param(
        DQDR_KERNEL,
        "tl.minimum(start_m + BLOCK_M + causal_offset, seqlen_kv)",
        "start_m + causal_offset",
        id="no diagonal",
    ),
    pytest.param(DQDR_KERNEL, "w_bias[:, None] - t * softmax_scale", "w_bias[:, None]", id="t left out of dq"),
    pytest.param(DQDR_KERNEL, "dp_mean[:, None] - dp", "dp - dp_mean[:, None]", id="dt with the other sign"),
    pytest.param(
        DECODE_KERNEL, "weight = tl.exp2(m_splits - m_max)", "weight = m_splits * 0.0 + 1.0", id="splits not rescaled"
    ),
    pytest.param(DECODE_KERNEL, "(offs_n >= start_n) & ", "", id="keys of a block moved back taken twice"),
    pytest.param(
        DECODE_KERNEL, "num_blocks * (split + 1) // NUM_SPLITS", "num_blocks // NUM_SPLITS * (split + 1)", id="tail"
    ),
    pytest.param(DECODE_KERNEL, "tl.store(arrival_counters_ptr + tile, 0)", "pass", id="counters not set back"),
    pytest.param(
        DECODE_KERNEL,
        "is_query = offs_stack < STACK_ROWS",
        "is_query = offs_stack >= STACK_ROWS",
        id="queries and probes swapped",
    ),
    pytest.param(DECODE_KERNEL, "tl.minimum(start_h + BLOCK_H, GROUP)", "start_h + 1", id="one head merged"),
]


@pytest.mark.parametrize(("kernel", "right", "faulty"), FAULTS)
def test_checks_detect_a_faulty_kernel(kernel: Kernel, right: str, faulty: str) -> None:
    spec, config = kernel.spec, kernel.config
    source = render(spec, config, GPU)
    assert right in source.text
    text = source.text.replace(right, faulty)
    source = KernelSource("wrong", text, hashlib.sha256(text.encode()).hexdigest())
    shape = Shape(batch=4, heads=2 * spec.group, kv_heads=2, seqlen_q=1, seqlen_kv=205)
    if spec.public_op != "decode":
        shape = replace(shape, batch=3 if spec.varlen else 1, seqlen_q=171, seqlen_kv=175, window=41 * spec.window)
    if spec.op == "preprocess":
        shape = Shape(batch=1, heads=2, kv_heads=2, seqlen_q=75, seqlen_kv=61)  # 14 rows see no key
    inputs = inputs_of(spec, shape, seed=2)
    assert verify.launch_and_check(source, spec, config, inputs, verify.oracle(spec, inputs)).wrong is not None
