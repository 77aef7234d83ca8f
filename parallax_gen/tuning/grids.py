"""Grids of shapes: what other kernels are quoted at, and what serving asks for."""

from __future__ import annotations

from parallax_gen.problem.shapes import Shape
from parallax_gen.tuning.usual import TRAINING, USUAL_TRAINING

# The official kernels' own benchmark: one sequence, MHA, (head_dim, shape). Left out: caches over 2 GiB of keys.
_HEADS = tuple(2**n for n in range(12))
_KEYS = tuple(2**n for n in range(7, 16))
_LARGEST = 2**31  # bytes of bf16 keys
OFFICIAL = tuple(
    (head_dim, Shape(1, heads, heads, 1, keys))
    for head_dim in (64, 128)
    for heads in _HEADS
    for keys in _KEYS
    if 2 * heads * keys * head_dim <= _LARGEST
)

# A model of 8 billion parameters, 32 query heads over 8 kv heads, whole and as each of 2, 4 and 8 GPUs has it. Left
# out: caches that no card of 80 GB holds.
_MOST_KEYS = 2**26  # (sequence, kv head, key) triples: 34 GB of bf16 keys and values
SERVING = tuple(
    (128, Shape(batch, heads, kv_heads, 1, keys))
    for heads, kv_heads in ((32, 8), (16, 4), (8, 2), (4, 1))
    for batch in (1, 8, 32, 64, 128)
    for keys in (1024, 4096, 16384, 65536)
    if batch * kv_heads * keys <= _MOST_KEYS
)

GRIDS = {"official": OFFICIAL, "serving": SERVING}

# The sweep of Parallax's paper, by op: batches of 1 to 2048 sequences over 128 to 32768 keys. Decode is of 8 heads, as
# the official kernels are quoted, and whole: its largest caches take 275 GB, and who runs it leaves out what does not
# fit. Training is of 16 heads, and of at most 2**18 tokens a step.
_BATCHES = tuple(2**n for n in range(12))
_MOST_TOKENS = 2**18
PAPER = {
    "decode": tuple((128, Shape(batch, 8, 8, 1, keys)) for batch in _BATCHES for keys in _KEYS),
    TRAINING: tuple(
        (128, Shape(batch, 16, 16, keys, keys)) for batch in _BATCHES for keys in _KEYS if batch * keys <= _MOST_TOKENS
    ),
}

# The steps that are in real use, of every head_dim.
STEPS = tuple((head_dim, shape) for head_dim, shapes in USUAL_TRAINING.items() for shape in shapes)

# What is compared: grid -> op -> (head_dim, shape).
SWEEPS = {
    **{name: {"decode": shapes} for name, shapes in GRIDS.items()},
    TRAINING: {TRAINING: STEPS},
    "paper": PAPER,
}
