"""The client's canonical JSON equals that of the reference implementation, byte for byte."""

from __future__ import annotations

import math

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from lorry.verification import canonical_json

SAFE = 2**53 - 1
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-SAFE, SAFE) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=20,
)


@given(VALUES)
def test_any_value_matches_the_reference(value: object) -> None:
    assert canonical_json.encode(value) == rfc8785.dumps(value)  # type: ignore[arg-type]


@given(st.integers(0, 2**64 - 1))
def test_any_double_matches_the_reference(bits: int) -> None:
    import struct

    value = struct.unpack("<d", bits.to_bytes(8, "little"))[0]
    if math.isfinite(value):
        assert canonical_json.number(value).encode() == rfc8785.dumps(value)


@pytest.mark.parametrize("value", [1e20, 1e21, 123456789012345680000.0, 1e-6, 1e-7, 5e-324, -0.0, 0.1, 100.0, 1.5e300])
def test_edges_of_exponent_notation_match_the_reference(value: float) -> None:
    assert canonical_json.number(value).encode() == rfc8785.dumps(value)


def test_keys_are_sorted_by_utf16_code_units() -> None:
    assert canonical_json.encode({"\ufb33": 1, "\U0001f600": 2, "a": 3}) == '{"a":3,"\U0001f600":2,"\ufb33":1}'.encode()


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**53, "\ud800", {"\ud800": 1}, object()])
def test_values_without_a_canonical_form_are_rejected(value: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        canonical_json.encode(value)
