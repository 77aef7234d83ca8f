"""One kernel of each kind at small awkward sizes, to run under compute-sanitizer; each is checked against float64.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/memcheck.py

Without the caching allocator each tensor is a separate allocation, so an access past its end is detected.
"""

from __future__ import annotations

from typing import Any

from parallax_gen.codegen.device import gpu_of_device
from parallax_gen.codegen.render import render
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.space import default_config
from parallax_gen.oracle import verify
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

EQUAL_LENGTHS, DECODE_VARLEN = {"op": "decode", "group": 4}, {"op": "decode_varlen", "group": 4}
PROMPT = {"multi_token": True, "causal": True, "varlen": True, "stats": True, "page_size": 16, **DECODE_VARLEN}
DECODE: list[tuple[int, str, dict[str, Any], KernelConfig]] = [
    (128, "bf16", EQUAL_LENGTHS, DecodeConfig(32, 8, 4, "last", 1, 4)),
    (96, "fp16", EQUAL_LENGTHS, DecodeConfig(32, 8, 6, "kernel", 2, 3)),
    (128, "bf16", DECODE_VARLEN, DecodeConfig(32, 8, 6, "kernel", 1, 3)),
    (128, "bf16", DECODE_VARLEN, DecodeConfig(64, 8, 4, "last", 2, 3)),
    (128, "bf16", {"page_size": 16, "stats": True, **DECODE_VARLEN}, DecodeConfig(32, 8, 6, "kernel", 1, 3)),
    (64, "bf16", {"page_size": 1, "leftpad": True, **DECODE_VARLEN}, DecodeConfig(32, 8, 2, "last", 1, 3)),
    (128, "bf16", {"page_size": 64, "cache_dtype": "e4m3", **DECODE_VARLEN}, DecodeConfig(64, 8, 3, "kernel", 2, 3)),
    (
        96,
        "fp16",
        {"cache_dtype": "e5m2", "window": True, "causal": True, **DECODE_VARLEN},
        DecodeConfig(32, 8, 2, "last", 1, 3),
    ),
    (128, "bf16", PROMPT, DecodeConfig(64, 64, 2, "last", 8, 2)),
]
TRAINING = [
    KernelSpec("dkdv", 128, "bf16", causal=True),
    KernelSpec("dkdv", 96, "fp16", group=2, causal=True, window=True, varlen=True),
]
STEP = ("forward", "preprocess", "dkdv", "dqdr")


def main() -> None:
    gpu, shape = gpu_of_device(0), Shape(1, 4, 4, 256, 256)
    cases = [(KernelSpec(head_dim=head_dim, dtype=dtype, **more), config) for head_dim, dtype, more, config in DECODE]
    specs = [spec.for_op(op) for spec in TRAINING for op in STEP]
    cases += [(spec, default_config(spec, shape, gpu)) for spec in specs]
    for spec, config in cases:
        source = render(spec, config, gpu)
        for seed in range(3):
            small = op_of(spec).awkward_shape(spec, config)
            result = verify.check(source, spec, config, small, seed=seed, device="cuda")
            assert not result.wrong, (spec, config, result.wrong)
        print(f"{spec}: right", flush=True)


if __name__ == "__main__":
    main()
