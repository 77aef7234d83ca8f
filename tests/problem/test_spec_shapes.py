"""Specs, shapes, buckets and the work that a call means."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.shapes import SHORTEST, Bucket, Shape, bucket_of, representative, work_of
from parallax_gen.problem.spec import DTYPES, HEAD_DIMS, OPS, KernelSpec

SIZE = st.integers(1, 2**30)
GROUP = st.integers(1, 64)
UNHURRIED = settings(deadline=None)  # a busy machine is no failure


@st.composite
def specs(draw: st.DrawFn) -> KernelSpec:
    op = draw(st.sampled_from(OPS))
    flags = {n: draw(st.booleans()) for n in (("causal", "stats") if op == "forward" else ("ragged",))}
    return KernelSpec(op, draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from(DTYPES)), draw(GROUP), **flags)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    batch, kv_heads, group, seqlen_q, seqlen_kv = (draw(s) for s in (SIZE, SIZE, GROUP, SIZE, SIZE))
    return Shape(batch, kv_heads * group, kv_heads, seqlen_q, seqlen_kv)


@UNHURRIED
@given(specs())
def test_specs_survive_a_dict(spec: KernelSpec) -> None:
    assert KernelSpec.from_dict(spec.to_dict()) == spec


@UNHURRIED
@given(shapes())
def test_shapes_and_buckets_survive_a_dict(shape: Shape) -> None:
    assert Shape.from_dict(shape.to_dict()) == shape
    bucket = bucket_of(shape)
    assert Bucket.from_dict(bucket.to_dict()) == bucket


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "backwards"}, "op: got 'backwards'; allowed: forward, decode"),
        ({"head_dim": 80}, "head_dim: got 80; allowed: 64, 128"),
        ({"head_dim": 64.0}, "head_dim: got 64.0; allowed: 64, 128"),
        ({"dtype": "fp8"}, "dtype: got 'fp8'; allowed: bf16, fp16, fp32"),
        ({"group": 0}, "group: got 0; allowed: an int of 1 or more (query heads per kv head)"),
        ({"group": True}, "group: got True; allowed: an int of 1 or more (query heads per kv head)"),
        ({"causal": 1}, "causal: got 1; allowed: True or False"),
        ({"ragged": True}, "ragged: got True with op 'forward'; allowed: True with op 'decode' only"),
        ({"op": "decode", "causal": True}, "causal: got True with op 'decode'; allowed: True with op 'forward' only"),
        ({"op": "decode", "stats": True}, "stats: got True with op 'decode'; allowed: True with op 'forward' only"),
    ],
)
def test_a_spec_says_what_it_allows(change: dict[str, object], message: str) -> None:
    good = {"op": "forward", "head_dim": 64, "dtype": "bf16"}
    with pytest.raises(ArgumentError) as caught:
        KernelSpec(**{**good, **change})  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", [KernelSpec, Shape, Bucket])
@pytest.mark.parametrize("data", [{}, {"surprise": 1}])
def test_dicts_with_other_fields(kind: type[KernelSpec] | type[Shape] | type[Bucket], data: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match="exactly the fields"):
        kind.from_dict(data)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1, 1, 1), "batch: got 0; allowed: an int of 1 or more"),
        ((1, 1, 1, 1, 1.0), "seqlen_kv: got 1.0; allowed: an int of 1 or more"),
        ((1, 6, 4, 1, 1), "heads: got 6; allowed: a multiple of kv_heads (4)"),
    ],
)
def test_a_shape_says_what_it_allows(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Shape(*sizes)
    assert str(caught.value) == message


@pytest.mark.parametrize("size", [0, 3, -4, 2.0, None])
def test_a_bucket_is_of_powers_of_two(size: object) -> None:
    with pytest.raises(ArgumentError, match="allowed: a power of two"):
        Bucket(kv_rows=1, seqlen_q=1, seqlen_kv=size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (KernelSpec("forward", 128, "bf16", causal=True), "forward, head_dim 128, bf16, MHA, causal"),
        (KernelSpec("decode", 64, "fp16", group=4, ragged=True), "decode, head_dim 64, fp16, GQA 4:1, ragged"),
        (Shape(2, 16, 16, 4096, 4096), "batch 2, heads 16, seqlen 4096"),
        (Shape(2, 16, 4, 1, 4096), "batch 2, heads 16/4, seqlen 1x4096"),
        (Bucket(8, 1, 4096), "8 kv rows, seqlen 1x4096"),
    ],
)
def test_what_people_read(value: object, text: str) -> None:
    assert str(value) == text


@UNHURRIED
@given(shapes())
def test_a_bucket_is_within_sqrt_2_of_its_shapes(shape: Shape) -> None:
    bucket = bucket_of(shape)
    for size, of_bucket in (
        (shape.batch * shape.kv_heads, bucket.kv_rows),
        (1 if shape.seqlen_q == 1 else max(shape.seqlen_q, SHORTEST), bucket.seqlen_q),
        (max(shape.seqlen_kv, SHORTEST), bucket.seqlen_kv),
    ):
        assert size**2 <= 2 * of_bucket**2
        assert of_bucket**2 <= 2 * size**2


@UNHURRIED
@given(shapes(), GROUP)
def test_a_buckets_representative_is_in_it(shape: Shape, group: int) -> None:
    bucket = bucket_of(shape)
    stands_for_it = representative(bucket, group)
    assert bucket_of(stands_for_it) == bucket
    assert stands_for_it.group == group


@UNHURRIED
@given(shapes(), GROUP)
def test_the_group_is_the_specs_and_not_the_buckets(shape: Shape, group: int) -> None:
    assert bucket_of(Shape(**{**shape.to_dict(), "heads": shape.kv_heads * group})) == bucket_of(shape)


@pytest.mark.parametrize(
    ("shape", "bucket"),
    [
        (Shape(4, 16, 16, 4096, 4096), Bucket(64, 4096, 4096)),
        (Shape(1, 32, 8, 1, 1000), Bucket(8, 1, 1024)),
        (Shape(3, 1, 1, 2, 1), Bucket(4, 128, 128)),
        (Shape(1, 1, 1, 181, 182), Bucket(1, 128, 256)),  # 128 * sqrt(2) is 181.02
    ],
)
def test_buckets(shape: Shape, bucket: Bucket) -> None:
    assert bucket_of(shape) == bucket


@pytest.mark.parametrize(
    ("spec", "shape", "flops", "size"),
    [
        # 8·B·H·L²·D FLOP; q, r, k, v and o once each
        (
            KernelSpec("forward", 128, "bf16"),
            Shape(4, 16, 16, 4096, 4096),
            8 * 4 * 16 * 4096**2 * 128,
            5 * 2 * 4 * 16 * 4096 * 128,
        ),
        # half of it, and v̄ (bf16), lse and t̄ (fp32) written too
        (
            KernelSpec("forward", 128, "bf16", causal=True, stats=True),
            Shape(4, 16, 16, 4096, 4096),
            4 * 4 * 16 * 4096**2 * 128,
            6 * 2 * 4 * 16 * 4096 * 128 + 2 * 4 * 4 * 16 * 4096,
        ),
        # queries at the end of a longer cache: a rectangle and a triangle
        (
            KernelSpec("forward", 64, "fp16", causal=True),
            Shape(1, 1, 1, 10, 100),
            8 * 64 * (10 * 90 + 10 * 10 / 2),
            2 * 64 * (3 * 10 + 2 * 100),
        ),
        # more queries than keys: the first ninety see none
        (
            KernelSpec("forward", 64, "fp32", causal=True),
            Shape(1, 1, 1, 100, 10),
            8 * 64 * 10 * 10 / 2,
            4 * 64 * (3 * 100 + 2 * 10),
        ),
        # decode with 4 query heads a kv head: k and v are read once for the group
        (
            KernelSpec("decode", 128, "bf16", group=4),
            Shape(2, 32, 8, 1, 8192),
            8 * 2 * 32 * 8192 * 128,
            2 * (2 * 2 * 8 * 8192 * 128 + 3 * 2 * 32 * 128),
        ),
    ],
)
def test_work(spec: KernelSpec, shape: Shape, flops: float, size: float) -> None:
    work = work_of(spec, shape)
    assert (work.flops, work.bytes) == (flops, size)
