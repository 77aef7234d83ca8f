"""What is asked of a kernel: everything that changes its meaning, and nothing that only changes its speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from parallax_gen.errors import ArgumentError

OPS = ("forward", "preprocess", "dkdv", "dqdr", "decode")
DTYPES = ("bf16", "fp16", "fp32", "tf32")
LARGEST_HEAD_DIM = 256
LARGEST_READ = {"group": 2**16, "page_size": 2**31}  # of what was read from a file, which may be anyone's
CACHE_DTYPES = ("", "e4m3", "e5m2")

BYTES_PER_ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}

# Fields that came after records were first written: absent from a record, they are at their default there.
LATER = ("window", "varlen", "page_size", "leftpad", "many_queries", "cache_dtype")

# Which ops a flag is of.
FLAGS = {
    "causal": ("forward", "dkdv", "dqdr", "decode"),
    "stats": ("forward", "decode"),
    "ragged": ("decode",),
    "window": ("forward", "dkdv", "dqdr", "decode"),
    "varlen": ("forward", "preprocess", "dkdv", "dqdr", "decode"),
    "leftpad": ("decode",),
    "many_queries": ("decode",),
}

# What decode knows only where every sequence has its own length.
RAGGED_ONLY = ("causal", "stats", "window", "varlen", "leftpad", "many_queries", "page_size", "cache_dtype")


@dataclass(frozen=True)
class KernelSpec:
    """One Parallax kernel, by meaning.

    op        "forward": seqlen_q queries a sequence; its backward is three kernels: "preprocess" (what dkdv and dqdr
              need of each query row), "dkdv" and "dqdr"; "decode": queries against a KV cache, one a sequence but
              with many_queries.
    head_dim  width of q, r, k and v: any multiple of 8 up to 256.
    dtype     of inputs and outputs: "bf16", "fp16" or "fp32"; "tf32" is fp32 whose matmuls round to tf32. Sums are
              always fp32.
    group     query heads per kv head, any number from 1 (MHA) up (GQA, MQA); 1 for preprocess, which sees no keys.
    causal    query i sees keys up to seqlen_kv - seqlen_q + i (aligned to the end).
    stats     forward and decode: also writes lse, t̄ and v̄, which the backward needs, and joining of parts.
    ragged    decode only: every sequence has its own length, read on the device from cache_seqlens. What follows of
              decode needs it, and so do its causal, stats, window and varlen (of queries).
    window    causal only: a query sees the last window_size of the keys that it would see.
    varlen    sequences are packed one after the other, and begin where cu_seqlens says; queries alone in decode.
    page_size decode only: the cache is in pages of so many keys, which a page table puts in order; 0 for a cache in
              one piece a sequence.
    leftpad   decode only: a sequence's first key is where cache_leftpad says.
    many_queries  decode only: sequences have any number of queries, the last of which is at the last key. Else one,
              which is causal only in that a window may end at it.
    cache_dtype  decode only: "e4m3" or "e5m2" for keys and values in eight bits; "" for those of dtype.

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
    leftpad: bool = False
    many_queries: bool = False
    cache_dtype: str = ""

    def __post_init__(self) -> None:
        _one_of("op", self.op, OPS)
        if type(self.head_dim) is not int or self.head_dim % 8 or not 0 < self.head_dim <= LARGEST_HEAD_DIM:
            raise ArgumentError("head_dim", f"{self.head_dim!r:.80}", f"a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
        _one_of("dtype", self.dtype, DTYPES[:3] if self.op == "preprocess" else DTYPES)
        if type(self.group) is not int or self.group < 1:
            raise ArgumentError("group", f"{self.group!r:.80}", "an int of 1 or more (query heads per kv head)")
        if self.op == "preprocess" and self.group != 1:
            raise ArgumentError("group", self.group, "1 with op 'preprocess', which sees no keys")
        for name, ops in FLAGS.items():
            value = getattr(self, name)
            if type(value) is not bool:
                raise ArgumentError(name, repr(value), "True or False")
            if value and self.op not in ops:
                raise ArgumentError(name, f"True with op {self.op!r}", f"True with op {' or '.join(ops)} only")
        if type(self.page_size) is not int or self.page_size < 0:
            raise ArgumentError("page_size", f"{self.page_size!r:.80}", "an int of 1 or more, or 0 for no pages")
        _one_of("cache_dtype", self.cache_dtype, CACHE_DTYPES)
        if self.cache_dtype and (self.op != "decode" or self.bytes_per_element != 2):
            raise ArgumentError("cache_dtype", self.cache_dtype, "'', but with op 'decode' and dtype bf16 or fp16")
        if self.page_size and self.op != "decode":
            raise ArgumentError("page_size", self.page_size, "0, but with op 'decode' and ragged=True")
        if self.window and not self.causal:
            raise ArgumentError("window", "True without causal", "True with causal=True only")
        if self.op == "decode":
            self._check_decode()

    def _check_decode(self) -> None:
        for name in RAGGED_ONLY:
            if getattr(self, name) and not self.ragged:
                raise ArgumentError(name, f"{getattr(self, name)} with op 'decode'", "with ragged=True only")
        if self.varlen and not self.many_queries:
            raise ArgumentError("varlen", "True with op 'decode'", "True with many_queries=True only")
        if self.causal and not (self.window or self.many_queries):
            raise ArgumentError("causal", "True with one query a sequence", "False, but with window or many_queries")

    @property
    def bytes_per_element(self) -> int:
        return BYTES_PER_ELEMENT[self.dtype]

    @property
    def cache_bytes(self) -> int:
        """Bytes of each number of k and v."""
        return 1 if self.cache_dtype else self.bytes_per_element

    def of(self, op: str) -> KernelSpec:
        """The spec of another kernel of the same training step: forward, preprocess, dkdv or dqdr."""
        if op == "preprocess":
            # It multiplies no matrices and sees rows alone.
            dtype = "fp32" if self.dtype == "tf32" else self.dtype
            return KernelSpec(op, self.head_dim, dtype, varlen=self.varlen)
        return replace(self, op=op, stats=op == "forward")

    def to_dict(self) -> dict[str, Any]:
        """Every field; those of LATER where they are not at their default."""
        return {name: value for name, value in vars(self).items() if value or name not in LATER}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KernelSpec:
        """The spec that `to_dict` wrote. Raises ArgumentError on unknown or missing fields, and on huge numbers."""
        names = {f.name for f in fields(cls)}
        if not names - set(LATER) <= set(data) <= names:
            raise ArgumentError("spec", sorted(data), f"the fields {sorted(names)}")
        spec = cls(**data)
        for name, largest in LARGEST_READ.items():
            if getattr(spec, name) > largest:
                raise ArgumentError(name, f"{getattr(spec, name)!r:.80}", f"at most {largest}")
        return spec

    def __str__(self) -> str:
        words = [self.op, f"head_dim {self.head_dim}", self.dtype]
        if self.op != "preprocess":  # which sees no keys
            words.append("MHA" if self.group == 1 else f"GQA {self.group}:1")
        if self.op in FLAGS["causal"] and not (self.op == "decode" and not self.many_queries and not self.window):
            words.append("window" if self.window else "causal" if self.causal else "full")
        words += [name for name in ("varlen", "stats", "ragged", "leftpad") if getattr(self, name)]
        words += ["many queries"] * self.many_queries
        words += [f"pages of {self.page_size}"] * (self.page_size > 0)
        words += [f"{self.cache_dtype} cache"] * (self.cache_dtype != "")
        return ", ".join(words)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or type(value) is not type(allowed[0]):
        raise ArgumentError(name, f"{value!r:.80}", ", ".join(map(str, allowed)))
