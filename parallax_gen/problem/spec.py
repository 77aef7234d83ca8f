"""The specification of a kernel: everything that changes its result, and nothing that changes only its speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from parallax_gen.errors import ArgumentError

OPS = ("forward", "preprocess", "dkdv", "dqdr", "decode", "decode_varlen")
# op -> its public name, in records, commands and messages, if that differs.
_PUBLIC_OP_OF = {"decode_varlen": "decode"}
PUBLIC_OPS = tuple(op for op in OPS if op not in _PUBLIC_OP_OF)
DTYPES = ("bf16", "fp16", "fp32", "tf32")
LARGEST_HEAD_DIM = 256
CACHE_DTYPES = ("", "e4m3", "e5m2")

BYTES_PER_ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}

# Field -> its name in records, result CSVs and kernels' names, if that differs. `memory/old.py` reads these.
NAMES_IN_RECORDS = {"multi_token": "many_queries"}
# Fields that were added after the first records: a record without such a field means its default.
ADDED_FIELDS = ("window", "varlen", "page_size", "leftpad", "many_queries", "cache_dtype", "softcap", "batch_invariant")

# Ops that read query rows and no keys: they have no groups of heads, and no matmuls.
QUERY_ROW_OPS = ("preprocess",)
PER_SEQUENCE_LENGTH_OPS = ("decode_varlen",)
PER_SEQUENCE_LENGTHS_TEXT, MULTI_TOKEN_TEXT = "per-sequence lengths", "multi-token queries"

# Flag -> the ops that have it.
FLAGS = {
    "causal": ("forward", "dkdv", "dqdr", *PER_SEQUENCE_LENGTH_OPS),
    "stats": ("forward", *PER_SEQUENCE_LENGTH_OPS),
    "window": ("forward", "dkdv", "dqdr", *PER_SEQUENCE_LENGTH_OPS),
    "varlen": ("forward", "preprocess", "dkdv", "dqdr", *PER_SEQUENCE_LENGTH_OPS),
    "leftpad": PER_SEQUENCE_LENGTH_OPS,
    "multi_token": PER_SEQUENCE_LENGTH_OPS,
    "softcap": ("forward", "dkdv", "dqdr", "decode", *PER_SEQUENCE_LENGTH_OPS),
    "batch_invariant": ("forward", "preprocess", "dkdv", "dqdr", *PER_SEQUENCE_LENGTH_OPS),
}


def public_op_of(op: str) -> str:
    """The name of an op in records, commands and messages.

    Both decode ops are "decode"; decode_varlen is the one with the flag `ragged` in records and `--ragged` in commands.
    """
    return _PUBLIC_OP_OF.get(op, op)


def name_in_errors(op: str) -> str:
    """The name of an op in error messages."""
    return op if op in PUBLIC_OPS else f"{public_op_of(op)} with {PER_SEQUENCE_LENGTHS_TEXT}"


@dataclass(frozen=True)
class KernelSpec:
    """What one Parallax kernel computes.

    op        "forward": seqlen_q queries per sequence. Its backward is three kernels: "preprocess" (statistics of each
              query row that dkdv and dqdr need), "dkdv" and "dqdr". "decode": one query per sequence against a KV
              cache, in which all sequences have the same length. "decode_varlen": each sequence has its own length,
              read on the device from cache_seqlens, and one query unless multi_token is set.
    head_dim  width of q, r, k and v: any multiple of 8 up to 256.
    dtype     of inputs and outputs: "bf16", "fp16" or "fp32"; "tf32" is fp32 whose matmuls round to tf32. Sums are
              always fp32.
    group     query heads per kv head, any number from 1 (MHA) up (GQA, MQA); 1 for preprocess, which sees no keys.
    causal    query i sees keys up to seqlen_kv - seqlen_q + i (aligned to the end).
    stats     forward and decode_varlen: also writes lse, t_mean and v_mean, for the backward, and to merge parts of
              attention.
    window    causal only: a query sees only the last window_size of its visible keys.
    varlen    sequences are packed back to back, with offsets in cu_seqlens; in decode_varlen only their queries.
    softcap   scores s become c·tanh(s/c) before the softmax, as in Gemma 2; c, the softcap, is an argument of a launch.

    batch_invariant  the bits of a sequence's results do not depend on the batch around it. Only decode_varlen has other
                     kernels for it; see memory/place.py for the configs.

    Only decode_varlen:

    page_size    keys per page of a cache that a page table orders; 0 for a cache without pages.
    leftpad      cache_leftpad has the position of each sequence's first key.
    multi_token  multi-token queries: a sequence has any number of queries, and its last query is at its last key.
                 Otherwise each sequence has one query, for which causal matters only with a window.
    cache_dtype  "e4m3" or "e5m2" for 8-bit keys and values; "" for keys and values of dtype.

    Raises ArgumentError on any other value.
    """

    op: str
    head_dim: int
    dtype: str
    group: int = 1
    causal: bool = False
    stats: bool = False
    window: bool = False
    varlen: bool = False
    page_size: int = 0
    leftpad: bool = False
    multi_token: bool = False
    cache_dtype: str = ""
    softcap: bool = False
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        _check_choice("op", self.op, OPS)
        if type(self.head_dim) is not int or self.head_dim % 8 or not 0 < self.head_dim <= LARGEST_HEAD_DIM:
            raise ArgumentError("head_dim", f"{self.head_dim!r:.80}", f"a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
        is_query_row_op, per_sequence_lengths = self.op in QUERY_ROW_OPS, self.per_sequence_lengths
        _check_choice("dtype", self.dtype, DTYPES[:3] if is_query_row_op else DTYPES)
        if type(self.group) is not int or self.group < 1:
            raise ArgumentError("group", f"{self.group!r:.80}", "an int of 1 or more (query heads per kv head)")
        if is_query_row_op and self.group != 1:
            raise ArgumentError("group", self.group, f"1 with op {self.op!r}, which sees no keys")
        for name, ops in FLAGS.items():
            value = getattr(self, name)
            if type(value) is not bool:
                raise ArgumentError(name, repr(value), "True or False")
            if value and self.op not in ops:
                allowed = " or ".join(map(name_in_errors, ops))
                raise ArgumentError(name, f"True with op {name_in_errors(self.op)!r}", f"True only with op {allowed}")
        if type(self.page_size) is not int or self.page_size < 0:
            raise ArgumentError("page_size", f"{self.page_size!r:.80}", "an int of 1 or more, or 0 for no pages")
        _check_choice("cache_dtype", self.cache_dtype, CACHE_DTYPES)
        if self.cache_dtype and not (per_sequence_lengths and self.bytes_per_element == 2):
            allowed = f"'', except for decode with {PER_SEQUENCE_LENGTHS_TEXT}, in bf16 or fp16"
            raise ArgumentError("cache_dtype", self.cache_dtype, allowed)
        if self.page_size and not per_sequence_lengths:
            raise ArgumentError("page_size", self.page_size, f"0, except for decode with {PER_SEQUENCE_LENGTHS_TEXT}")
        if self.window and not self.causal:
            raise ArgumentError("window", "True without causal", "True only with causal=True")
        if per_sequence_lengths and self.varlen and not self.multi_token:
            raise ArgumentError(
                "varlen", f"True with op {name_in_errors(self.op)!r}", f"True only with {MULTI_TOKEN_TEXT}"
            )
        if per_sequence_lengths and self.causal and not (self.window or self.multi_token):
            raise ArgumentError(
                "causal", "True with one query per sequence", f"False, except with window or {MULTI_TOKEN_TEXT}"
            )

    @property
    def public_op(self) -> str:
        """The name of its op in records, commands and messages."""
        return public_op_of(self.op)

    @property
    def per_sequence_lengths(self) -> bool:
        """Whether each sequence has its own number of keys, which the kernel reads on the device."""
        return self.op in PER_SEQUENCE_LENGTH_OPS

    @property
    def bytes_per_element(self) -> int:
        return BYTES_PER_ELEMENT[self.dtype]

    @property
    def cache_bytes(self) -> int:
        """Bytes per element of k and v."""
        return 1 if self.cache_dtype else self.bytes_per_element

    def for_op(self, op: str) -> KernelSpec:
        """The spec of another kernel of the same training step: forward, preprocess, dkdv or dqdr."""
        if op in QUERY_ROW_OPS:
            # It has no matmuls, and reads only query rows.
            dtype = "fp32" if self.dtype == "tf32" else self.dtype
            return KernelSpec(op, self.head_dim, dtype, varlen=self.varlen, batch_invariant=self.batch_invariant)
        return replace(self, op=op, stats=op == "forward")

    def flat(self) -> dict[str, Any]:
        """All fields, with the names and the order of records: the public op, and the flag `ragged`."""
        values = {NAMES_IN_RECORDS.get(name, name): value for name, value in vars(self).items()}
        values["op"] = self.public_op
        first = ("op", "head_dim", "dtype", "group", "causal", "stats")
        return {name: values[name] for name in first} | {"ragged": self.per_sequence_lengths} | values

    def to_dict(self) -> dict[str, Any]:
        """`flat` without the fields of ADDED_FIELDS that have their default. `memory.old.spec_from` is the inverse."""
        return {name: value for name, value in self.flat().items() if value or name not in ADDED_FIELDS}

    def __str__(self) -> str:
        flat = self.flat()
        parts = [self.public_op, f"head_dim {self.head_dim}", self.dtype]
        if self.op not in QUERY_ROW_OPS:
            parts.append("MHA" if self.group == 1 else f"GQA {self.group}:1")
        # A single query sees all keys of its window.
        if self.op in FLAGS["causal"] and (not self.per_sequence_lengths or self.multi_token or self.window):
            parts.append("window" if self.window else "causal" if self.causal else "full")
        parts += [name for name in ("varlen", "stats") if flat[name]]
        parts += [PER_SEQUENCE_LENGTHS_TEXT] * flat["ragged"] + ["leftpad"] * self.leftpad
        parts += [MULTI_TOKEN_TEXT] * self.multi_token
        parts += [f"pages of {self.page_size}"] * (self.page_size > 0)
        parts += [f"{self.cache_dtype} cache"] * (self.cache_dtype != "")
        parts += ["softcap"] * self.softcap
        parts += ["batch-invariant"] * self.batch_invariant
        return ", ".join(parts)


def batch_invariant_spec(spec: KernelSpec) -> KernelSpec:
    """The spec of the same call with batch_invariant=True: of decode with per-sequence lengths, if it is decode."""
    return replace(spec, op="decode_varlen" if spec.public_op == "decode" else spec.op, batch_invariant=True)


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or type(value) is not type(allowed[0]):
        raise ArgumentError(name, f"{value!r:.80}", ", ".join(map(str, allowed)))
