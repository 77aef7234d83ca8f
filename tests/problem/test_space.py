"""The space of configs and the default config: everything proposed is valid, and nothing is left without a default."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax_gen.problem.config import DecodeConfig, ForwardConfig, config_to_dict
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.heuristics import default_config
from parallax_gen.problem.shapes import Bucket, representative
from parallax_gen.problem.space import KNOBS, coerce, every_config, knobs_of, neighbours, why_invalid
from parallax_gen.problem.spec import DTYPES, HEAD_DIMS, KernelSpec

H200 = GPUS["h200"]

SPECS = st.one_of(
    st.builds(
        KernelSpec,
        st.just("forward"),
        st.sampled_from(HEAD_DIMS),
        st.sampled_from(DTYPES),
        group=st.integers(1, 130),
        causal=st.booleans(),
        stats=st.booleans(),
    ),
    st.builds(
        KernelSpec,
        st.just("decode"),
        st.sampled_from(HEAD_DIMS),
        st.sampled_from(DTYPES),
        group=st.integers(1, 130),
        ragged=st.booleans(),
    ),
)
POWERS = st.integers(0, 17).map(lambda n: 1 << n)


@given(SPECS, POWERS, POWERS, POWERS, st.sampled_from(list(GPUS.values())))
def test_every_call_has_a_valid_default(spec, kv_rows, seqlen_q, seqlen_kv, gpu) -> None:
    bucket = Bucket(kv_rows, 1 if spec.op == "decode" else seqlen_q, seqlen_kv)
    config = default_config(spec, representative(bucket, spec.group), gpu)
    assert why_invalid(spec, config, gpu) is None


@given(SPECS, st.sampled_from(list(GPUS.values())))
def test_neighbours_are_valid_and_one_knob_away(spec, gpu) -> None:
    config = default_config(spec, representative(Bucket(8, 1 if spec.op == "decode" else 4096, 4096), spec.group), gpu)
    found = neighbours(spec, config, gpu)
    assert found
    assert len(set(found)) == len(found)
    for near in found:
        assert why_invalid(spec, near, gpu) is None
        mine, other = config_to_dict(config), config_to_dict(near)
        differ = {name for name in mine if mine[name] != other[name]}
        assert len(differ - {"merge"}) <= 1  # merging follows from the number of splits
        assert differ


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["forward", "decode"])
def test_every_config_is_valid_and_comes_once(op: str, dtype: str) -> None:
    spec = KernelSpec(op, 128, dtype)
    found = list(every_config(spec, H200))
    assert len(set(found)) == len(found) > 20
    assert all(why_invalid(spec, config, H200) is None for config in found)


def test_knobs_leave_out_what_a_spec_cannot_use() -> None:
    def values(spec: KernelSpec, name: str) -> tuple[object, ...]:
        return next(knob.values for knob in knobs_of(spec) if knob.name == name)

    assert values(KernelSpec("decode", 128, "bf16", group=4), "BLOCK_H") == (8,)
    assert values(KernelSpec("decode", 128, "bf16", group=9), "BLOCK_H") == (8, 16)
    assert 16 not in values(KernelSpec("forward", 128, "bf16"), "BLOCK_N")
    assert 16 in values(KernelSpec("forward", 128, "fp32"), "BLOCK_N")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ForwardConfig(128, 64, 1, 4, 2), "registers"),
        (ForwardConfig(32, 32, 1, 4, 2), "too small"),
        (ForwardConfig(100, 64, 1, 4, 2), "BLOCK_M is 100"),
        (DecodeConfig(32, 8, 1, "none", 1, 4), "does not configure"),
    ],
)
def test_reasons_say_what_is_wrong_with_a_forward_config(config: ForwardConfig, reason: str) -> None:
    assert reason in str(why_invalid(KernelSpec("forward", 128, "bf16"), config, H200))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DecodeConfig(32, 8, 1, "last", 1, 4), "does not go with"),
        (DecodeConfig(32, 8, 4, "none", 1, 4), "does not go with"),
        (DecodeConfig(16, 8, 4, "last", 4, 4), "keys each"),
        (DecodeConfig(32, 16, 4, "last", 1, 4), "half empty"),
        (DecodeConfig(128, 8, 4, "last", 4, 6), "shared memory"),
    ],
)
def test_reasons_say_what_is_wrong_with_a_decode_config(config: DecodeConfig, reason: str) -> None:
    assert reason in str(why_invalid(KernelSpec("decode", 128, "bf16"), config, H200))


def test_shared_memory_is_the_gpus() -> None:
    spec, config = KernelSpec("forward", 128, "bf16"), ForwardConfig(128, 64, 1, 8, 3)
    assert why_invalid(spec, config, H200) is None
    assert "shared memory" in str(why_invalid(spec, config, GPUS["rtx4090"]))


def test_one_split_has_nothing_to_merge() -> None:
    spec = KernelSpec("decode", 128, "bf16")
    first = {knob.name: knob.values[0] for knob in KNOBS["decode"]}
    assert coerce(spec, {**first, "NUM_SPLITS": 1, "merge": "kernel"}) == coerce(spec, {**first, "merge": "none"})
    assert coerce(spec, {**first, "NUM_SPLITS": 4, "merge": "none"}).merge == "last"  # type: ignore[union-attr]
