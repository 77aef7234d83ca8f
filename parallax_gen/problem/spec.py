"""What is asked of a kernel: everything that changes its meaning, and nothing that only changes its speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from parallax_gen.errors import ArgumentError

OPS = ("forward", "decode")
DTYPES = ("bf16", "fp16", "fp32")
HEAD_DIMS = (64, 128)

BYTES_PER_ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class KernelSpec:
    """One Parallax kernel, by meaning.

    op        "forward": seqlen_q queries a sequence; "decode": one query a sequence against a KV cache.
    head_dim  width of q, r, k and v.
    dtype     of inputs and output: "bf16", "fp16" or "fp32". Sums are always fp32.
    group     query heads per kv head, any number from 1 (MHA) up (GQA, MQA).
    causal    forward only: query i sees keys up to seqlen_kv - seqlen_q + i (aligned to the end).
    stats     forward only: also writes lse, t̄ and v̄, which the backward needs.
    ragged    decode only: every sequence has its own length, read on the device from cache_seqlens.

    Raises ArgumentError on any other value.
    """

    op: str
    head_dim: int
    dtype: str
    group: int = 1
    causal: bool = False
    stats: bool = False
    ragged: bool = False

    def __post_init__(self) -> None:
        _one_of("op", self.op, OPS)
        _one_of("head_dim", self.head_dim, HEAD_DIMS)
        _one_of("dtype", self.dtype, DTYPES)
        if type(self.group) is not int or self.group < 1:
            raise ArgumentError("group", self.group, "an int of 1 or more (query heads per kv head)")
        for name, op in (("causal", "forward"), ("stats", "forward"), ("ragged", "decode")):
            value = getattr(self, name)
            if type(value) is not bool:
                raise ArgumentError(name, repr(value), "True or False")
            if value and self.op != op:
                raise ArgumentError(name, f"True with op {self.op!r}", f"True with op {op!r} only")

    @property
    def bytes_per_element(self) -> int:
        return BYTES_PER_ELEMENT[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KernelSpec:
        """The spec that `to_dict` wrote. Raises ArgumentError on unknown or missing fields."""
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            raise ArgumentError("spec", sorted(data), f"exactly the fields {sorted(names)}")
        return cls(**data)

    def __str__(self) -> str:
        words = [self.op, f"head_dim {self.head_dim}", self.dtype]
        words.append("MHA" if self.group == 1 else f"GQA {self.group}:1")
        if self.op == "forward":
            words.append("causal" if self.causal else "full")
        words += [name for name in ("stats", "ragged") if getattr(self, name)]
        return ", ".join(words)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or type(value) is not type(allowed[0]):
        raise ArgumentError(name, repr(value), ", ".join(map(str, allowed)))
