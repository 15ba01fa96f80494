"""RFC 8785 canonical JSON, the input of the digests of manifests and lineage records.

It is implemented here to avoid a dependency: the client installs only three packages and verifies offline.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import cast

_LARGEST_SAFE_INTEGER = 2**53 - 1


def sha256(value: object) -> str:
    """Return the SHA-256 of the canonical form, in hex."""
    return hashlib.sha256(encode(value)).hexdigest()


def encode(value: object) -> bytes:
    """Return the canonical form. Raises ValueError for NaN, integers beyond 2^53 - 1, and lone surrogates."""
    return _text(value).encode("utf-8")


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        if abs(value) > _LARGEST_SAFE_INTEGER:
            raise ValueError(f"{value} is too large for canonical JSON")
        return str(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        members = cast("Mapping[str, object]", value)
        ordered = sorted(members, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(f"{json.dumps(key, ensure_ascii=False)}:{_text(members[key])}" for key in ordered) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(_text(item) for item in cast("Sequence[object]", value)) + "]"
    raise ValueError(f"{type(value).__name__} has no canonical JSON")


def number(value: float) -> str:
    """Format like ECMAScript's Number::toString: the shortest digits that round-trip; exponents from 1e21 and below
    1e-6."""
    if not math.isfinite(value):
        raise ValueError("JSON has no NaN or Infinity")
    if value == 0:
        return "0"
    sign, digit_tuple, exponent = Decimal(repr(value)).normalize().as_tuple()
    digits = "".join(map(str, digit_tuple))
    point = len(digits) + int(exponent)  # number of digits before the decimal point
    if 0 < point <= 21:
        body = digits.ljust(point, "0") if point >= len(digits) else f"{digits[:point]}.{digits[point:]}"
    elif -6 < point <= 0:
        body = "0." + "0" * -point + digits
    else:
        fraction = f".{digits[1:]}" if len(digits) > 1 else ""
        body = f"{digits[0]}{fraction}e{point - 1:+d}"
    return "-" * sign + body
