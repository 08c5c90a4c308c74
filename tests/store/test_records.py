"""JSON records: one canonical encoding; no changed byte goes unnoticed."""

import json
import math
from typing import Any

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.errors import DamagedObject
from penstock.store.records import crc32c, decode_record, encode_record

SAMPLE: dict[str, Any] = {
    "index": 12,
    "nested": {"b": [1.5, None, True], "a": "é\u4e2d"},
    "objects": {"acts/blocks.0.hook_out": {"size": 4100, "crc32c": 77}},
}

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.dictionaries(st.text().filter(lambda key: key != "crc32c"), VALUES, max_size=5)


def test_crc32c_is_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_canonical_bytes_are_golden() -> None:
    encoded = encode_record({"b": 1, "a": "é"})
    assert encoded == b'{"a":"\\u00e9","b":1,"crc32c":2052240385}\n'
    assert google_crc32c.value(b'{"a":"\\u00e9","b":1}\n') == 2052240385


def test_the_order_of_keys_does_not_matter() -> None:
    assert encode_record({"a": 1, "b": 2}) == encode_record({"b": 2, "a": 1})


def test_encoding_again_changes_nothing() -> None:
    once = encode_record(SAMPLE)
    assert encode_record(json.loads(once)) == once


@given(RECORDS)
def test_records_come_back(record: dict[str, Any]) -> None:
    assert decode_record(encode_record(record), "x") == record


def test_every_flipped_bit_is_noticed() -> None:
    whole = encode_record(SAMPLE)
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedObject, match=r"^some/record is damaged"):
            decode_record(bytes(flipped), "some/record")


def test_every_cut_is_noticed() -> None:
    whole = encode_record(SAMPLE)
    for length in range(len(whole)):
        with pytest.raises(DamagedObject):
            decode_record(whole[:length], "x")
    with pytest.raises(DamagedObject):
        decode_record(whole + b"\n", "x")


@pytest.mark.parametrize(
    "data",
    [
        b"null",
        b"[]",
        b"{}\n",
        b'{"a":1}\n',
        b'{"crc32c":"1"}\n',
        b'{"a":NaN,"crc32c":1}\n',
        b'{"a":"\\ud800","crc32c":1}\n',
        b"[" * 100_000,
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b'{"a":' + b"1" * 5000 + b',"crc32c":1}',
    ],
)
def test_what_is_no_record_is_damaged(data: bytes) -> None:
    with pytest.raises(DamagedObject):
        decode_record(data, "x")


@pytest.mark.parametrize("depth", range(100, 1500, 100))
def test_depth_is_no_way_round_the_error(depth: int) -> None:
    with pytest.raises(DamagedObject):
        decode_record(b'{"crc32c":1,"a":' + b"[" * depth + b"]" * depth + b"}", "x")


def test_the_same_content_in_other_bytes_is_damaged() -> None:
    whole = encode_record(SAMPLE)
    record = json.loads(whole)
    for other in (
        json.dumps(record).encode(),
        json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n",
        whole[:-1],
        b" " + whole,
    ):
        with pytest.raises(DamagedObject):
            decode_record(other, "x")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_json_are_not_encoded(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode_record({"a": value})
