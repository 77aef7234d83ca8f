"""What is asked of a kernel: everything that changes its meaning, and nothing that only changes its speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from parallax_gen.errors import ArgumentError

OPS = ("forward", "preprocess", "dkdv", "dqdr", "decode")
DTYPES = ("bf16", "fp16", "fp32", "tf32")
LARGEST_HEAD_DIM = 256
DECODE_HEAD_DIMS = (64, 128)

BYTES_PER_ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}

# Fields that came after records were first written: absent from a record, they are at their default there.
LATER = ("window", "varlen", "page_size")

# Which ops a flag is of.
FLAGS = {
    "causal": ("forward", "dkdv", "dqdr"),
    "stats": ("forward",),
    "ragged": ("decode",),
    "window": ("forward", "dkdv", "dqdr"),
    "varlen": ("forward", "preprocess", "dkdv", "dqdr"),
}


@dataclass(frozen=True)
class KernelSpec:
    """One Parallax kernel, by meaning.

    op        "forward": seqlen_q queries a sequence; its backward is three kernels: "preprocess" (what dkdv and dqdr
              need of each query row), "dkdv" and "dqdr"; "decode": one query a sequence against a KV cache.
    head_dim  width of q, r, k and v: any multiple of 8 up to 256; 64 or 128 for decode.
    dtype     of inputs and outputs: "bf16", "fp16" or "fp32"; "tf32" is fp32 whose matmuls round to tf32. Sums are
              always fp32.
    group     query heads per kv head, any number from 1 (MHA) up (GQA, MQA); 1 for preprocess, which sees no keys.
    causal    query i sees keys up to seqlen_kv - seqlen_q + i (aligned to the end).
    stats     forward only: also writes lse, t̄ and v̄, which the backward needs.
    ragged    decode only: every sequence has its own length, read on the device from cache_seqlens.
    window    causal only: a query sees the last window_size of the keys that it would see.
    varlen    sequences are packed one after the other, and begin where cu_seqlens says.
    page_size decode only: the cache is in pages of so many keys, which a page table puts in order; 0 for a cache in
              one piece a sequence. Every sequence has its own length.

    Raises ArgumentError on any other value.
    """

    op: str
    head_dim: int
    dtype: str
    group: int = 1
    causal: bool = False
    stats: bool = False
    ragged: bool = False
    window: bool = False
    varlen: bool = False
    page_size: int = 0

    def __post_init__(self) -> None:
        _one_of("op", self.op, OPS)
        if self.op == "decode":
            _one_of("head_dim", self.head_dim, DECODE_HEAD_DIMS)
        elif type(self.head_dim) is not int or self.head_dim % 8 or not 0 < self.head_dim <= LARGEST_HEAD_DIM:
            raise ArgumentError("head_dim", repr(self.head_dim), f"a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
        _one_of("dtype", self.dtype, DTYPES[:3] if self.op in ("decode", "preprocess") else DTYPES)
        if type(self.group) is not int or self.group < 1:
            raise ArgumentError("group", self.group, "an int of 1 or more (query heads per kv head)")
        if self.op == "preprocess" and self.group != 1:
            raise ArgumentError("group", self.group, "1 with op 'preprocess', which sees no keys")
        for name, ops in FLAGS.items():
            value = getattr(self, name)
            if type(value) is not bool:
                raise ArgumentError(name, repr(value), "True or False")
            if value and self.op not in ops:
                raise ArgumentError(name, f"True with op {self.op!r}", f"True with op {' or '.join(ops)} only")
        if type(self.page_size) is not int or self.page_size < 0:
            raise ArgumentError("page_size", repr(self.page_size), "an int of 1 or more, or 0 for no pages")
        if self.page_size and not (self.op == "decode" and self.ragged):
            raise ArgumentError("page_size", self.page_size, "0, but with op 'decode' and ragged=True")
        if self.window and not self.causal:
            raise ArgumentError("window", "True without causal", "True with causal=True only")

    @property
    def bytes_per_element(self) -> int:
        return BYTES_PER_ELEMENT[self.dtype]

    def of(self, op: str) -> KernelSpec:
        """The spec of another kernel of the same training step: forward, preprocess, dkdv or dqdr."""
        if op == "preprocess":
            # It multiplies no matrices and sees rows alone.
            dtype = "fp32" if self.dtype == "tf32" else self.dtype
            return KernelSpec(op, self.head_dim, dtype, varlen=self.varlen)
        return replace(self, op=op, stats=op == "forward")

    def to_dict(self) -> dict[str, Any]:
        """Every field; those of LATER where they are not at their default."""
        return {name: value for name, value in asdict(self).items() if value or name not in LATER}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KernelSpec:
        """The spec that `to_dict` wrote. Raises ArgumentError on unknown or missing fields."""
        names = {f.name for f in fields(cls)}
        if not names - set(LATER) <= set(data) <= names:
            raise ArgumentError("spec", sorted(data), f"the fields {sorted(names)}")
        return cls(**data)

    def __str__(self) -> str:
        words = [self.op, f"head_dim {self.head_dim}", self.dtype]
        if self.op != "preprocess":  # which sees no keys
            words.append("MHA" if self.group == 1 else f"GQA {self.group}:1")
        if self.op in FLAGS["causal"]:
            words.append("window" if self.window else "causal" if self.causal else "full")
        words += [name for name in ("varlen", "stats", "ragged") if getattr(self, name)]
        words += [f"pages of {self.page_size}"] * (self.page_size > 0)
        return ", ".join(words)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or type(value) is not type(allowed[0]):
        raise ArgumentError(name, repr(value), ", ".join(map(str, allowed)))
