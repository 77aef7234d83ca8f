"""Specs, shapes and buckets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import compatible_flags

from parallax_gen.errors import ArgumentError
from parallax_gen.memory.old import spec_from
from parallax_gen.ops.space import timed_lengths, timed_shape
from parallax_gen.problem.shapes import (
    SHORTEST,
    Bucket,
    Shape,
    bucket_of,
    representative,
    sizes_of,
    skewed_lengths,
    spread_lengths,
)
from parallax_gen.problem.spec import CACHE_DTYPES, DTYPES, FLAGS, LARGEST_HEAD_DIM, OPS, KernelSpec
from parallax_gen.problem.work import work_of, work_of_lengths

SIZE = st.integers(1, 2**30)
GROUP = st.integers(1, 64)
NO_DEADLINE = settings(deadline=None)  # a busy machine must not fail the tests


@st.composite
def specs(draw: st.DrawFn) -> KernelSpec:
    """Any valid spec."""
    op = draw(st.sampled_from(OPS))
    head_dim = draw(st.sampled_from(range(8, LARGEST_HEAD_DIM + 1, 8)))
    dtype = draw(st.sampled_from([d for d in DTYPES if d != "tf32" or op != "preprocess"]))
    flags = compatible_flags(op, {name: draw(st.booleans()) for name, ops in FLAGS.items() if op in ops})
    spec = KernelSpec(op, head_dim, dtype, 1 if op == "preprocess" else draw(GROUP), **flags)
    if op == "decode_varlen":
        spec = replace(spec, page_size=draw(st.sampled_from((0, 1, 16, 100))))
    if op == "decode_varlen" and spec.bytes_per_element == 2:
        spec = replace(spec, cache_dtype=draw(st.sampled_from(CACHE_DTYPES)))
    return spec


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    batch, kv_heads, group, seqlen_q, seqlen_kv = (draw(s) for s in (SIZE, SIZE, GROUP, SIZE, SIZE))
    return Shape(batch, kv_heads * group, kv_heads, seqlen_q, seqlen_kv, draw(st.just(0) | SIZE))


@NO_DEADLINE
@given(specs())
def test_specs_round_trip_through_dicts(spec: KernelSpec) -> None:
    assert spec_from(spec.to_dict()) == spec


@NO_DEADLINE
@given(shapes())
def test_shapes_and_buckets_round_trip_through_dicts(shape: Shape) -> None:
    assert Shape.from_dict(shape.to_dict()) == shape
    bucket = bucket_of(shape)
    assert Bucket.from_dict(bucket.to_dict()) == bucket


VARLEN = "decode with per-sequence lengths"
OF_MANY = "True only with op forward or dkdv or dqdr or decode with per-sequence lengths"
A_HEAD_DIM = "a multiple of 8 from 8 to 256"
AN_EIGHT_BIT_CACHE = "'', except for decode with per-sequence lengths, in bf16 or fp16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "backwards"}, "op: got 'backwards'; allowed: forward, preprocess, dkdv, dqdr, decode, decode_varlen"),
        ({"head_dim": 7}, f"head_dim: got 7; allowed: {A_HEAD_DIM}"),
        ({"head_dim": 0}, f"head_dim: got 0; allowed: {A_HEAD_DIM}"),
        ({"head_dim": -8}, f"head_dim: got -8; allowed: {A_HEAD_DIM}"),
        ({"head_dim": 100}, f"head_dim: got 100; allowed: {A_HEAD_DIM}"),
        ({"head_dim": 264}, f"head_dim: got 264; allowed: {A_HEAD_DIM}"),
        ({"head_dim": 64.0}, f"head_dim: got 64.0; allowed: {A_HEAD_DIM}"),
        ({"op": "preprocess", "head_dim": 264}, f"head_dim: got 264; allowed: {A_HEAD_DIM}"),
        ({"op": "decode", "head_dim": 100}, f"head_dim: got 100; allowed: {A_HEAD_DIM}"),
        ({"dtype": "fp8"}, "dtype: got 'fp8'; allowed: bf16, fp16, fp32, tf32"),
        ({"op": "preprocess", "dtype": "tf32"}, "dtype: got 'tf32'; allowed: bf16, fp16, fp32"),
        ({"group": 0}, "group: got 0; allowed: an int of 1 or more (query heads per kv head)"),
        ({"group": True}, "group: got True; allowed: an int of 1 or more (query heads per kv head)"),
        ({"op": "preprocess", "group": 2}, "group: got 2; allowed: 1 with op 'preprocess', which sees no keys"),
        ({"causal": 1}, "causal: got 1; allowed: True or False"),
        ({"causal": True, "window": 128}, "window: got 128; allowed: True or False"),
        ({"varlen": None}, "varlen: got None; allowed: True or False"),
        ({"op": "preprocess", "causal": True}, f"causal: got True with op 'preprocess'; allowed: {OF_MANY}"),
        (
            {"op": "dkdv", "stats": True},
            "stats: got True with op 'dkdv'; allowed: True only with op forward or decode with per-sequence lengths",
        ),
        ({"leftpad": True}, f"leftpad: got True with op 'forward'; allowed: True only with op {VARLEN}"),
        (
            {"op": "dqdr", "multi_token": True},
            "multi_token: got True with op 'dqdr'; allowed: True only with op decode with per-sequence lengths",
        ),
        ({"op": "decode_varlen", "multi_token": 4}, "multi_token: got 4; allowed: True or False"),
        ({"op": "preprocess", "window": True}, f"window: got True with op 'preprocess'; allowed: {OF_MANY}"),
        ({"window": True}, "window: got True without causal; allowed: True only with causal=True"),
        ({"page_size": 16}, "page_size: got 16; allowed: 0, except for decode with per-sequence lengths"),
        ({"page_size": -1}, "page_size: got -1; allowed: an int of 1 or more, or 0 for no pages"),
        ({"page_size": True}, "page_size: got True; allowed: an int of 1 or more, or 0 for no pages"),
        ({"cache_dtype": "e4m3"}, f"cache_dtype: got e4m3; allowed: {AN_EIGHT_BIT_CACHE}"),
        (
            {"op": "decode_varlen", "dtype": "fp32", "cache_dtype": "e5m2"},
            f"cache_dtype: got e5m2; allowed: {AN_EIGHT_BIT_CACHE}",
        ),
        (
            {"op": "decode_varlen", "dtype": "tf32", "cache_dtype": "e5m2"},
            f"cache_dtype: got e5m2; allowed: {AN_EIGHT_BIT_CACHE}",
        ),
        ({"op": "decode", "cache_dtype": "e3m4"}, "cache_dtype: got 'e3m4'; allowed: , e4m3, e5m2"),
        ({"op": "decode", "cache_dtype": None}, "cache_dtype: got None; allowed: , e4m3, e5m2"),
        (
            {"op": "decode_varlen", "causal": True, "varlen": True, "window": True},
            "varlen: got True with op 'decode with per-sequence lengths'; allowed: True only with multi-token queries",
        ),
        (
            {"op": "decode_varlen", "causal": True},
            "causal: got True with one query per sequence; allowed: False, except with window or multi-token queries",
        ),
        (
            {"op": "decode_varlen", "multi_token": True, "window": True},
            "window: got True without causal; allowed: True only with causal=True",
        ),
    ],
)
def test_invalid_specs_are_explained(change: dict[str, object], message: str) -> None:
    good = {"op": "forward", "head_dim": 64, "dtype": "bf16"}
    with pytest.raises(ArgumentError) as caught:
        KernelSpec(**{**good, **change})  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("name", sorted({*FLAGS, "page_size", "cache_dtype"} - {"softcap"}))
def test_flags_of_decode_varlen_are_refused_for_decode(name: str) -> None:
    """With all other fields that the flag needs."""
    value = {"page_size": 16, "cache_dtype": "e4m3"}.get(name, True)
    needed = {"varlen": {"multi_token": True}, "causal": {"multi_token": True}}.get(name, {})
    needed |= {"causal": True} if name == "window" else {}
    given = {name: value, **needed}
    assert getattr(KernelSpec("decode_varlen", 96, "bf16", **given), name) == value  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=rf"; allowed: .* (op )?([a-z]+ or )*{VARLEN}\b") as caught:
        KernelSpec("decode", 96, "bf16", **given)  # type: ignore[arg-type]
    assert caught.value.argument in given


@pytest.mark.parametrize("op", OPS)
def test_every_multiple_of_8_is_a_head_dim(op: str) -> None:
    for head_dim in range(-8, 300):
        if head_dim in range(8, 257, 8):
            assert KernelSpec(op, head_dim, "bf16").head_dim == head_dim
        else:
            with pytest.raises(ArgumentError, match=f"head_dim: got {head_dim}; "):
                KernelSpec(op, head_dim, "bf16")


def test_kernels_of_a_training_step() -> None:
    flags = {"causal": True, "window": True, "varlen": True}
    forward = KernelSpec("forward", 96, "tf32", 4, stats=True, **flags)
    assert forward.for_op("dkdv") == KernelSpec("dkdv", 96, "tf32", 4, **flags)
    assert forward.for_op("dqdr") == KernelSpec("dqdr", 96, "tf32", 4, **flags)
    assert forward.for_op("preprocess") == KernelSpec("preprocess", 96, "fp32", varlen=True)
    dense = replace(forward, dtype="bf16", varlen=False)
    assert dense.for_op("preprocess") == KernelSpec("preprocess", 96, "bf16")
    assert forward.for_op("dkdv").for_op("forward") == replace(forward, stats=False).for_op("forward") == forward


FIELDS = {
    KernelSpec: "['batch_invariant', 'cache_dtype', 'causal', 'dtype', 'group', 'head_dim', 'leftpad', 'many_queries', "
    "'op', 'page_size', 'ragged', 'softcap', 'stats', 'varlen', 'window']",
    Shape: "['batch', 'heads', 'kv_heads', 'seqlen_kv', 'seqlen_q', 'window']",
    Bucket: "['kv_rows', 'seqlen_kv', 'seqlen_q', 'window']",
}
READ: dict[type, Callable[[Any], Any]] = {KernelSpec: spec_from, Shape: Shape.from_dict, Bucket: Bucket.from_dict}
# Records older than windows and packed sequences.
EARLIER = {
    KernelSpec: KernelSpec("forward", 128, "bf16", causal=True),
    Shape: Shape(4, 16, 16, 4096, 4096),
    Bucket: Bucket(64, 4096, 4096),
}
EARLIER_FIELDS = {
    KernelSpec: ["op", "head_dim", "dtype", "group", "causal", "stats", "ragged"],
    Shape: ["batch", "heads", "kv_heads", "seqlen_q", "seqlen_kv"],
    Bucket: ["kv_rows", "seqlen_q", "seqlen_kv"],
}


@pytest.mark.parametrize("kind", [KernelSpec, Shape, Bucket])
def test_dicts_with_other_fields(kind: type[KernelSpec] | type[Shape] | type[Bucket]) -> None:
    good = EARLIER[kind].to_dict()
    wrong = [{}, {"surprise": 1}, {"window": 1}, good | {"surprise": 1}]
    for data in (*wrong, *({n: v for n, v in good.items() if n != name} for name in good)):
        with pytest.raises(ArgumentError) as caught:
            READ[kind](data)
        argument = "spec" if kind is KernelSpec else kind.__name__.lower()
        assert str(caught.value) == f"{argument}: got {sorted(data)}; allowed: the fields {FIELDS[kind]}"


@pytest.mark.parametrize("kind", [KernelSpec, Shape, Bucket])
def test_dicts_older_than_windows_round_trip(
    kind: type[KernelSpec] | type[Shape] | type[Bucket],
) -> None:
    value = EARLIER[kind]
    assert list(value.to_dict()) == EARLIER_FIELDS[kind]
    assert READ[kind]({name: value.to_dict()[name] for name in EARLIER_FIELDS[kind]}) == value
    assert value.window == 0
    later = replace(value, window=True if kind is KernelSpec else 1024)  # type: ignore[type-var]
    assert list(later.to_dict()) == [*EARLIER_FIELDS[kind], "window"]
    assert READ[kind](later.to_dict()) == later != value


def test_dicts_older_than_multi_token_decode_round_trip() -> None:
    written = {
        "op": "decode",
        "head_dim": 128,
        "dtype": "bf16",
        "group": 4,
        "causal": False,
        "stats": False,
        "ragged": True,
        "page_size": 16,
    }
    spec = KernelSpec("decode_varlen", 128, "bf16", group=4, page_size=16)
    assert spec_from(written) == spec
    assert spec.to_dict() == written
    later = replace(spec, multi_token=True, leftpad=True, cache_dtype="e5m2")
    more = {"many_queries": True, "leftpad": True, "cache_dtype": "e5m2"}
    assert later.to_dict() == {**written, **more}
    assert spec_from(later.to_dict()) == later


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1, 1, 1), "batch: got 0; allowed: an int of 1 or more"),
        ((1, 1, 1, 1, 1.0), "seqlen_kv: got 1.0; allowed: an int of 1 or more"),
        ((1, 6, 4, 1, 1), "heads: got 6; allowed: a multiple of kv_heads (4)"),
        ((1, 1, 1, 1, 1, -1), "window: got -1; allowed: an int of 0 or more"),
        ((1, 1, 1, 1, 1, None), "window: got None; allowed: an int of 0 or more"),
        ((1, 1, 1, 1, 1, False), "window: got False; allowed: an int of 0 or more"),
    ],
)
def test_invalid_shapes_are_explained(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Shape(*sizes)
    assert str(caught.value) == message


@pytest.mark.parametrize("size", [0, 3, -4, 2.0, None])
def test_a_buckets_sizes_are_powers_of_two(size: object) -> None:
    with pytest.raises(ArgumentError, match="allowed: a power of two"):
        Bucket(kv_rows=1, seqlen_q=1, seqlen_kv=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [3, -4, 2.0, False, None])
def test_a_buckets_window_is_none_or_a_power_of_two(size: object) -> None:
    assert Bucket(1, 1, 1, window=0) == Bucket(1, 1, 1) != Bucket(1, 1, 1, window=1)
    with pytest.raises(ArgumentError, match=r"^window: got .*; allowed: a power of two$"):
        Bucket(kv_rows=1, seqlen_q=1, seqlen_kv=1, window=size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (KernelSpec("forward", 128, "bf16", causal=True), "forward, head_dim 128, bf16, MHA, causal"),
        (KernelSpec("decode_varlen", 64, "fp16", group=4), "decode, head_dim 64, fp16, GQA 4:1, per-sequence lengths"),
        (
            KernelSpec("decode_varlen", 64, "fp16", page_size=16),
            "decode, head_dim 64, fp16, MHA, per-sequence lengths, pages of 16",
        ),
        (KernelSpec("decode", 96, "tf32"), "decode, head_dim 96, tf32, MHA"),
        (
            KernelSpec("decode_varlen", 64, "bf16", causal=True, window=True),
            "decode, head_dim 64, bf16, MHA, window, per-sequence lengths",
        ),
        (
            KernelSpec("decode_varlen", 64, "bf16", multi_token=True),
            "decode, head_dim 64, bf16, MHA, full, per-sequence lengths, multi-token queries",
        ),
        (
            KernelSpec(
                "decode_varlen",
                8,
                "fp16",
                4,
                causal=True,
                stats=True,
                varlen=True,
                leftpad=True,
                multi_token=True,
                page_size=48,
                cache_dtype="e4m3",
            ),
            "decode, head_dim 8, fp16, GQA 4:1, causal, varlen, stats, per-sequence lengths, leftpad, "
            "multi-token queries, pages of 48, e4m3 cache",
        ),
        (Shape(2, 16, 16, 4096, 4096), "batch 2, heads 16, seqlen 4096"),
        (Shape(2, 16, 4, 1, 4096), "batch 2, heads 16/4, seqlen 1x4096"),
        (Bucket(8, 1, 4096), "batch x kv_heads 8, seqlen 1x4096"),
        (KernelSpec("preprocess", 128, "bf16"), "preprocess, head_dim 128, bf16"),
        (KernelSpec("preprocess", 8, "fp32", varlen=True), "preprocess, head_dim 8, fp32, varlen"),
        (KernelSpec("dqdr", 128, "tf32", group=2), "dqdr, head_dim 128, tf32, GQA 2:1, full"),
        (
            KernelSpec("forward", 96, "fp16", causal=True, window=True, varlen=True, stats=True),
            "forward, head_dim 96, fp16, MHA, window, varlen, stats",
        ),
        (Shape(2, 16, 16, 4096, 4096, 1000), "batch 2, heads 16, seqlen 4096, window 1000"),
        (Bucket(8, 2048, 4096, 1024), "batch x kv_heads 8, seqlen 2048x4096, window 1024"),
    ],
)
def test_display_texts(value: object, text: str) -> None:
    assert str(value) == text


@NO_DEADLINE
@given(shapes())
def test_a_bucket_is_within_sqrt_2_of_its_shapes(shape: Shape) -> None:
    bucket = bucket_of(shape)
    for size, of_bucket in (
        (shape.batch * shape.kv_heads, bucket.kv_rows),
        (1 if shape.seqlen_q == 1 else max(shape.seqlen_q, SHORTEST), bucket.seqlen_q),
        (max(shape.seqlen_kv, SHORTEST), bucket.seqlen_kv),
        (max(shape.window, SHORTEST) if shape.window else 0, bucket.window),
    ):
        assert size**2 <= 2 * of_bucket**2
        assert of_bucket**2 <= 2 * size**2


@NO_DEADLINE
@given(shapes(), GROUP)
def test_a_buckets_representative_is_in_it(shape: Shape, group: int) -> None:
    bucket = bucket_of(shape)
    stands_for_it = representative(bucket, group)
    assert bucket_of(stands_for_it) == bucket
    assert stands_for_it.group == group


@NO_DEADLINE
@given(shapes(), GROUP)
def test_buckets_do_not_depend_on_the_group(shape: Shape, group: int) -> None:
    assert bucket_of(Shape(**{**shape.to_dict(), "heads": shape.kv_heads * group})) == bucket_of(shape)


@pytest.mark.parametrize(
    ("shape", "bucket"),
    [
        (Shape(4, 16, 16, 4096, 4096), Bucket(64, 4096, 4096)),
        (Shape(1, 32, 8, 1, 1000), Bucket(8, 1, 1024)),
        (Shape(3, 1, 1, 2, 1), Bucket(4, 128, 128)),
        (Shape(1, 1, 1, 181, 182), Bucket(1, 128, 256)),  # 128 * sqrt(2) is 181.02
        (Shape(1, 1, 1, 4096, 4096, 1000), Bucket(1, 4096, 4096, 1024)),
        (Shape(1, 1, 1, 4096, 4096, 1), Bucket(1, 4096, 4096, 128)),
        (Shape(1, 1, 1, 4096, 4096, 182), Bucket(1, 4096, 4096, 256)),
        (Shape(1, 1, 1, 128, 128, 10**6), Bucket(1, 128, 128, 1 << 20)),
    ],
)
def test_buckets(shape: Shape, bucket: Bucket) -> None:
    assert bucket_of(shape) == bucket


def test_decode_varlen_is_timed_with_different_lengths() -> None:
    ragged, sizes = KernelSpec("decode_varlen", 128, "bf16"), Shape(6, 8, 8, 1, 4096)
    spread, skewed = timed_lengths(ragged, sizes)
    assert spread == (4096, 2048, 1024, 512, 256, 128)
    assert skewed == (4096, 128, 128, 128, 128, 128)
    assert timed_shape(ragged, sizes) == replace(sizes, seqlen_kv=1067)
    both = 4 * 2 * 8 * 128 * sum(spread + skewed)
    assert 2 * work_of(ragged, timed_shape(ragged, sizes)).flops == pytest.approx(both, rel=1e-3)
    uniform, multi_token = KernelSpec("decode", 128, "bf16"), replace(ragged, multi_token=True)
    for spec, shape in (
        (uniform, sizes),
        (multi_token, replace(sizes, seqlen_q=128)),
        (ragged, replace(sizes, batch=1)),
    ):
        assert timed_lengths(spec, shape) == ((4096,) * shape.batch,)
        assert timed_shape(spec, shape) == shape


def test_work_with_lengths_counts_existing_keys() -> None:
    ragged, sizes = KernelSpec("decode_varlen", 128, "bf16", 4), Shape(3, 32, 8, 1, 4096)
    work = work_of_lengths(ragged, sizes, (4096, 128, 128))
    assert work.flops == 2 * 4 * 32 * 128 * (4096 + 128 + 128)
    assert work.bytes == 2 * 128 * (2 * 8 * (4096 + 128 + 128) + 3 * 3 * 32)
    assert work_of_lengths(ragged, sizes, ()) == work_of_lengths(ragged, sizes, (4096,) * 3) == work_of(ragged, sizes)
    windowed, windowed_sizes = replace(ragged, causal=True, window=True), replace(sizes, window=1000)
    assert work_of_lengths(windowed, windowed_sizes, (4096, 128, 128)).bytes == 2 * 128 * (2 * 8 * 1256 + 3 * 3 * 32)


def test_batches_of_lengths_by_name() -> None:
    assert spread_lengths(Shape(6, 1, 1, 1, 4096)) == (4096, 2048, 1024, 512, 256, 128)
    assert skewed_lengths(Shape(8, 1, 1, 1, 4096)) == (4096, *[128] * 7)
    assert spread_lengths(Shape(1, 1, 1, 1, 7)) == skewed_lengths(Shape(1, 1, 1, 1, 7)) == (7,)
    assert skewed_lengths(Shape(2, 1, 1, 1, 3)) == (3, 1)


@given(batch=st.integers(1, 200), seqlen_kv=SIZE)
@NO_DEADLINE
def test_no_batch_has_longer_lengths_than_the_first(batch: int, seqlen_kv: int) -> None:
    """Caches hold NaN past the lengths of the first batch, so no other batch may read further."""
    first, *others = timed_lengths(KernelSpec("decode_varlen", 128, "bf16"), Shape(batch, 1, 1, 1, seqlen_kv))
    for lengths in (first, *others):
        assert len(lengths) == batch
        assert max(lengths) == seqlen_kv
        assert all(1 <= length <= longest for length, longest in zip(lengths, first, strict=True))


@pytest.mark.parametrize("size", [2, 3, 5, 6, 11, 12, 90, 91, 181, 182, 5000, 5792, 5793, 2**40 + 1])
def test_the_sizes_that_a_bucket_represents(size: int) -> None:
    """The ends of each range are in the bucket, and their neighbours are not."""
    bucket = bucket_of(Shape(size, 1, 1, size, size))
    rows, lengths = re.findall(r"(\d+)(?: to (\d+))?", sizes_of(bucket))

    def has_rows(rows: int) -> bool:
        return bucket_of(Shape(rows, 1, 1, 1, 1)).kv_rows == bucket.kv_rows

    def has_length(keys: int) -> bool:
        return bucket_of(Shape(1, 1, 1, 1, keys)).seqlen_kv == bucket.seqlen_kv

    for ends, has in ((rows, has_rows), (lengths, has_length)):
        first, last = int(ends[0]), int(ends[1] or ends[0])
        assert first <= size <= last
        assert [has(first), has(last), has(last + 1)] == [True, True, False]
        assert first == 1 or not has(first - 1)


def test_the_sizes_of_other_buckets() -> None:
    assert sizes_of(Bucket(8, 1, 128)) == "batch x kv_heads 6 to 11, 1 query, 1 to 181 keys"
    assert sizes_of(Bucket(1, 256, 4096)) == "batch x kv_heads 1, 182 to 362 queries, 2897 to 5792 keys"
    assert sizes_of(Bucket(2, 4096, 4096, 512)).endswith("seqlen 2897 to 5792, window 363 to 724")
