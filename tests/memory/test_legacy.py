"""The names that earlier versions gave ops in records."""

from __future__ import annotations

import pytest

from parallax_gen.errors import ArgumentError
from parallax_gen.memory.old import OPS_OF_RECORDS, op_of_record, spec_from
from parallax_gen.problem.spec import OPS, KernelSpec


@pytest.mark.parametrize(
    ("op", "ragged", "message"),
    [
        ("forward", True, "ragged: got True with op 'forward'; allowed: True only with op decode"),
        ("decode", 1, "ragged: got 1; allowed: True or False"),
        ("decode", None, "ragged: got None; allowed: True or False"),
        ("decode_varlen", False, "op: got 'decode_varlen'; allowed: forward, preprocess, dkdv, dqdr, decode"),
        ([1], False, "op: got [1]; allowed: forward, preprocess, dkdv, dqdr, decode"),
    ],
)
def test_a_record_that_names_no_op_is_refused(op: object, ragged: object, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        op_of_record(op, ragged)
    assert str(caught.value) == message


def test_each_op_has_one_name_in_records() -> None:
    assert [op_of_record(*name) for name in OPS_OF_RECORDS] == list(OPS)
    for op in OPS:
        spec = KernelSpec(op, 64, "bf16")
        assert (spec.to_dict()["op"], spec.to_dict()["ragged"]) == (spec.public_op, op == "decode_varlen")
        assert spec_from(spec.to_dict()) == spec


def test_errors_in_a_records_spec_use_the_names_of_records() -> None:
    data = KernelSpec("decode", 64, "bf16").to_dict()
    for wrong, message in (
        ({"page_size": 16}, "page_size: got 16; allowed: 0, except for decode with per-sequence lengths"),
        (
            {"stats": True},
            "stats: got True with op 'decode'; allowed: True only with op forward or decode with per-sequence lengths",
        ),
        (
            {"many_queries": True},
            "many_queries: got True with op 'decode'; allowed: True only with op decode with per-",
        ),
        ({"ragged": True, "causal": True}, "causal: got True with one query per sequence; allowed: False, except with"),
    ):
        with pytest.raises(ArgumentError) as caught:
            spec_from(data | wrong)
        assert str(caught.value).startswith(message)
        assert "decode_varlen" not in str(caught.value)
    with pytest.raises(ArgumentError, match=r"^causal: got 'decode_varlen'; allowed: True or False$"):
        spec_from(data | {"causal": "decode_varlen"})  # the given value is quoted unchanged
