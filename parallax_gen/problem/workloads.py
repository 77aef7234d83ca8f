"""The default workloads of tune and bench: usual shapes and grids, and which kernels a shape and flags select."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import FLAGS, PUBLIC_OPS, KernelSpec, public_op_of

# The kernels of a training step, in the order in which they run. TRAINING names all of them together.
STEP = ("forward", "preprocess", "dkdv", "dqdr")
TRAINING = "training"
OPS_AND_TRAINING = (*PUBLIC_OPS, TRAINING)

USUAL_HEAD_DIM = 128

# Forward: a training step, a long prompt, many short sequences, and a shape between these, all with about equal work.
# Decode: one sequence and a batch, over short and long caches; also with four query heads per kv head (GQA).
USUAL_SHAPES: dict[str, tuple[Shape, ...]] = {
    "forward": (
        Shape(4, 16, 16, 4096, 4096),
        Shape(1, 16, 16, 16384, 16384),
        Shape(16, 16, 16, 1024, 1024),
        Shape(8, 16, 16, 2048, 2048),
    ),
    "decode": (
        *(Shape(batch, 8, 8, 1, keys) for batch in (1, 32) for keys in (1024, 4096, 16384)),
        *(Shape(batch, 32, 8, 1, 8192) for batch in (1, 32)),
    ),
}

# Training steps by head_dim, with the windows that models use.
USUAL_TRAINING: dict[int, tuple[Shape, ...]] = {
    128: (
        Shape(32, 6, 6, 2048, 2048),  # nanochat, 12 layers
        Shape(32, 6, 6, 2048, 2048, 513),
        Shape(32, 10, 10, 2048, 2048),  # 20 layers
        Shape(16, 12, 12, 2048, 2048),  # 24 layers
        Shape(16, 12, 12, 2048, 2048, 513),
        Shape(4, 16, 8, 4096, 4096),  # like Qwen3-0.6B and 1.7B
        Shape(2, 32, 8, 8192, 8192),  # a model of 8 billion parameters, with GQA
        Shape(4, 16, 16, 4096, 4096),  # the shape of kernel comparisons
        Shape(1, 16, 16, 16384, 16384),  # a long context
        Shape(1, 16, 16, 16384, 16384, 4096),
    ),
    64: (Shape(8, 32, 32, 2048, 2048),),  # fla's default
    96: (Shape(4, 32, 32, 4096, 4096),),
    256: (Shape(2, 8, 4, 4096, 4096),),
}


_SIZES = re.compile(r"(\d+),(\d+)(?:/(\d+))?,(?:(\d+)x)?(\d+)")


@dataclass(frozen=True)
class Sizes:
    """Sizes as a user typed them, for any op; seqlen_q is None if one length was given for queries and keys."""

    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int | None
    seqlen_kv: int

    def for_op(self, op: str) -> Shape:
        """The shape for `op`. A single length counts queries and keys; for decode, the keys of one query."""
        seqlen_q = self.seqlen_q
        if seqlen_q is None:
            seqlen_q = 1 if op == "decode" else self.seqlen_kv
        return Shape(self.batch, self.heads, self.kv_heads, seqlen_q, self.seqlen_kv)

    @classmethod
    def from_text(cls, text: str) -> Sizes | None:
        """The inverse of `str`; None for another text."""
        match = _SIZES.fullmatch(re.sub(r"\s", "", text))
        if match is None:
            return None
        batch, heads, kv_heads, seqlen_q, seqlen_kv = match.groups()
        lengths = int(seqlen_q) if seqlen_q else None, int(seqlen_kv)
        return cls(int(batch), int(heads), int(kv_heads or heads), *lengths)

    def __str__(self) -> str:
        """As a user types them: 1,32/8,128x4096."""
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        queries = f"{self.seqlen_q}x" if self.seqlen_q else ""
        return f"{self.batch},{heads},{queries}{self.seqlen_kv}"


@dataclass(frozen=True)
class Flags:
    """The requested properties of kernels besides op, head_dim, dtype and sizes. An op ignores flags it does not have.

    causal     None, the default, means causal
    window     how many keys a query sees; None, the default, means the shape's own window
    page_size  keys per page of decode's cache; 0 for none
    others     as in KernelSpec

    per_sequence_lengths  for decode, `--ragged` in commands. Implied by the flags that only such decode has, by several
                          queries per sequence, and by varlen
    """

    causal: bool | None = None
    stats: bool = False
    per_sequence_lengths: bool = False
    window: int | None = None
    varlen: bool = False
    page_size: int = 0
    leftpad: bool = False
    cache_dtype: str = ""
    softcap: bool = False
    batch_invariant: bool = False

    def apply_window(self, shape: Shape) -> Shape:
        """The shape with the requested window.

        A window of all keys counts as none, but if batch_invariant as one of all keys, as at run time.
        """
        window = shape.window if self.window is None else self.window
        if self.causal is False and self.window is None:
            window = 0
        if window >= shape.seqlen_kv:
            window = shape.seqlen_kv * (self.batch_invariant and window > 0)
        return replace(shape, window=window)


NO_FLAGS = Flags()

# Boolean flag -> the ops that have it, under their names for users.
OPS_WITH_FLAG = {
    f.name: {public_op_of(op) for op in FLAGS.get(f.name, ("decode_varlen",))}
    for f in fields(Flags)
    if f.name in FLAGS or f.name == "per_sequence_lengths"
}


def has_flag(op: str, flag: str) -> bool:
    """Whether an op, or TRAINING, has a flag of OPS_WITH_FLAG. The forward of a training step always has stats."""
    if op == TRAINING:
        return flag != "stats" and "forward" in OPS_WITH_FLAG[flag]
    return op in OPS_WITH_FLAG[flag]


def has_kernel(op: str, spec: KernelSpec) -> bool:
    """Whether a spec is a kernel of a public op, or of TRAINING."""
    if op == TRAINING:
        return spec.public_op in STEP and spec == spec.for_op(spec.public_op)
    return spec.public_op == op


def flag_concerns(flag: str, op: str, spec: KernelSpec) -> bool:
    """Whether a flag that is asked of an op is asked of this kernel: those of TRAINING have some of its flags each."""
    return op != TRAINING or has_flag(spec.public_op, flag)


def usual_shapes(op: str, head_dims: tuple[int, ...] = ()) -> dict[int, tuple[Shape, ...]]:
    """The usual shapes of an op, or of TRAINING, by head_dim: those in `head_dims`, or all if it is empty."""
    if op in USUAL_SHAPES:
        return dict.fromkeys(head_dims or (USUAL_HEAD_DIM,), USUAL_SHAPES[op])
    return {
        head_dim: USUAL_TRAINING[head_dim] for head_dim in head_dims or USUAL_TRAINING if head_dim in USUAL_TRAINING
    }


def sizes_for(op: str, shape: Shape, flags: Flags) -> Shape:
    """The sizes that an op's kernel gets for a shape: preprocess reads only query rows."""
    if op == "preprocess":
        return Shape(shape.batch, shape.heads, shape.heads, shape.seqlen_q, shape.seqlen_q)
    return flags.apply_window(shape) if has_flag(op, "window") else shape


def spec_for(op: str, head_dim: int, dtype: str, shape: Shape, flags: Flags) -> KernelSpec:
    """The spec of an op's kernel for a shape of `sizes_for`. Raises ArgumentError if there is none."""
    requested = {name: getattr(flags, name) for name in OPS_WITH_FLAG if name in FLAGS}
    requested |= {"causal": flags.causal is not False, "window": shape.window > 0}
    fields_of_op: dict[str, Any] = {name: value for name, value in requested.items() if has_flag(op, name)}
    if op == "decode":
        multi_token = shape.seqlen_q > 1 or flags.varlen
        fields_of_op["causal"] = requested["window"] or (multi_token and requested["causal"])
        fields_of_op.update(multi_token=multi_token, page_size=flags.page_size, cache_dtype=flags.cache_dtype)
        if flags.per_sequence_lengths or any(
            value for name, value in fields_of_op.items() if "decode" not in FLAGS.get(name, ())
        ):
            op = "decode_varlen"
    return KernelSpec(op, head_dim, dtype, shape.group, **fields_of_op)


def kernels(op: str, head_dim: int, dtype: str, shape: Shape, flags: Flags) -> list[tuple[KernelSpec, Shape]]:
    """The kernels of an op, or of TRAINING, at a shape, each with its sizes."""
    if op != TRAINING:
        sizes = sizes_for(op, shape, flags)
        return [(spec_for(op, head_dim, dtype, sizes, flags), sizes)]
    step = spec_for("forward", head_dim, dtype, sizes_for("forward", shape, flags), flags)
    return [(step.for_op(kernel), sizes_for(kernel, shape, flags)) for kernel in STEP]


# -- Grids of shapes: of the published results of other kernels, and of serving.

# The grid of parallax-kernel's benchmark: one sequence, MHA, (head_dim, shape). Left out: caches over 2 GiB of keys.
_HEADS = tuple(2**n for n in range(12))
_KEYS = tuple(2**n for n in range(7, 16))
_MAX_KEY_BYTES = 2**31  # in bf16
PARALLAX_KERNEL = tuple(
    (head_dim, Shape(1, heads, heads, 1, keys))
    for head_dim in (64, 128)
    for heads in _HEADS
    for keys in _KEYS
    if 2 * heads * keys * head_dim <= _MAX_KEY_BYTES
)

# A model of 8 billion parameters with 32 query heads and 8 kv heads, on one GPU and split over 2, 4 and 8 GPUs. Left
# out: caches that do not fit on a card with 80 GB.
_MAX_KEYS = 2**26  # (sequence, kv head, key) triples: 34 GB of bf16 keys and values
SERVING = tuple(
    (128, Shape(batch, heads, kv_heads, 1, keys))
    for heads, kv_heads in ((32, 8), (16, 4), (8, 2), (4, 1))
    for batch in (1, 8, 32, 64, 128)
    for keys in (1024, 4096, 16384, 65536)
    if batch * kv_heads * keys <= _MAX_KEYS
)

GRIDS = {"parallax-kernel": PARALLAX_KERNEL, "serving": SERVING}

# The grid of the Parallax paper, by op: batches of 1 to 2048 sequences over 128 to 32768 keys. Decode has 8 heads, as
# in the published results of parallax-kernel. The grid is complete: its largest caches take 275 GB, and a run leaves
# out those that do not fit. Training has 16 heads, and at most 2**18 tokens per step.
_BATCHES = tuple(2**n for n in range(12))
_MAX_TOKENS = 2**18
PAPER = {
    "decode": tuple((128, Shape(batch, 8, 8, 1, keys)) for batch in _BATCHES for keys in _KEYS),
    TRAINING: tuple(
        (128, Shape(batch, 16, 16, keys, keys)) for batch in _BATCHES for keys in _KEYS if batch * keys <= _MAX_TOKENS
    ),
}

# The training steps of real models, for every head_dim.
MODEL_STEPS = tuple((head_dim, shape) for head_dim, shapes in USUAL_TRAINING.items() for shape in shapes)

# The shapes that `bench` compares for each grid: grid -> op -> (head_dim, shape).
BENCH_GRIDS = {
    **{name: {"decode": shapes} for name, shapes in GRIDS.items()},
    TRAINING: {TRAINING: MODEL_STEPS},
    "paper": PAPER,
}

_STEP_AND_PROMPT = (Shape(4, 16, 16, 4096, 4096), Shape(1, 16, 16, 16384, 16384))

# The shapes that `bench` compares by default: op -> (head_dim, shape). Decode: from few bytes to many, one sequence
# and a batch, MHA and GQA. Forward and training: a training step and a long prompt.
DEFAULT_SHAPES: dict[str, tuple[tuple[int, Shape], ...]] = {
    "forward": tuple((128, shape) for shape in _STEP_AND_PROMPT),
    "decode": (
        *((128, Shape(batch, 8, 8, 1, keys)) for batch in (1, 32) for keys in (512, 1024, 4096, 16384)),
        (128, Shape(1, 32, 8, 1, 16384)),
        (128, Shape(32, 32, 8, 1, 8192)),
        (64, Shape(8, 16, 16, 1, 4096)),
    ),
    TRAINING: (
        *((128, shape) for shape in _STEP_AND_PROMPT),
        *((dim, shape) for dim, shapes in USUAL_TRAINING.items() for shape in shapes if shape not in _STEP_AND_PROMPT),
    ),
}
