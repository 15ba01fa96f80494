"""Verifies the signature of a pulled adapter's lineage record: a DSSE envelope of an in-toto statement (Ed25519).

The keys must come from the service that trained the adapter (`GET /v1/keys.json`), never from the adapter's folder.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from lorry.errors import LorryError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:lorry:lineage:1"
UNKNOWN_KEY = "The signature in lineage.json was made with an unknown key."
Status = Literal["valid", "invalid", "unknown_key"]
_MAX_PAYLOAD_CHARACTERS = 2**16


def read_keys(text: str | bytes, *, source: str = "The text") -> list[Mapping[str, Any]]:
    """Return the Ed25519 keys of a JSON Web Key Set. Raises LorryError if the text from `source` is not one or contains
    none."""
    try:
        parsed: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_a_key_set(source, "it is not valid JSON") from error
    found = cast("dict[str, object]", parsed).get("keys") if isinstance(parsed, dict) else None
    if not isinstance(found, list):
        raise _not_a_key_set(source, "it has no list 'keys'")
    keys = cast("list[object]", found)
    signing_keys = [cast("dict[str, Any]", key) for key in keys if isinstance(key, dict)]
    signing_keys = [key for key in signing_keys if key.get("kty") == "OKP" and key.get("crv") == "Ed25519"]
    if not signing_keys:
        raise _not_a_key_set(source, "its list 'keys' contains no Ed25519 key")
    return [*signing_keys]


def check(
    envelope: object, *, lineage_id: object, artifact: str, keys: Sequence[Mapping[str, Any]]
) -> tuple[Status, str | None]:
    """Check that an owner of `keys` issued this record for these files. Return the status and, if not, the problem."""
    if not isinstance(envelope, dict):
        return "invalid", "lineage.json has no signature."
    fields = cast("dict[str, Any]", envelope)
    try:
        payload = _decoded(fields["payload"])
        signatures = [(str(each["keyid"]), _decoded(each["sig"])) for each in fields["signatures"]]
        is_signed = fields["payloadType"] == PAYLOAD_TYPE and any(
            _is_valid(_encoding(payload), signature, key_id, keys) for key_id, signature in signatures
        )
        statement: Any = json.loads(payload)
        subjects = [each["digest"]["sha256"] for each in statement["subject"]]
        kind, issued = (statement["_type"], statement["predicateType"]), statement["predicate"]["lineage_id"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return "invalid", "The signature in lineage.json is malformed."
    if signatures and not {key_id for key_id, _ in signatures} & {key.get("kid") for key in keys}:
        return "unknown_key", UNKNOWN_KEY
    if not is_signed:
        return "invalid", "The signature in lineage.json was not made with the key that it names."
    if kind != (STATEMENT_TYPE, PREDICATE_TYPE) or issued != lineage_id or subjects != [artifact]:
        return "invalid", "The signature in lineage.json belongs to another adapter."
    return "valid", None


def key_retired_at(envelope: Mapping[str, Any], keys: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the Unix time at which the key of this valid envelope was retired; None if the key is in use."""
    signed = _encoding(_decoded(envelope["payload"]))
    used_keys = [
        key
        for key in keys
        for each in envelope["signatures"]
        if _is_valid(signed, _decoded(each["sig"]), str(each["keyid"]), [key])
    ]
    retired = [key.get("retired_at") for key in used_keys]
    return None if None in retired else max(map(float, filter(None, retired)))


def _encoding(payload: bytes) -> bytes:
    """Return the signed bytes: the PAE of DSSE v1."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _is_valid(signed: bytes, signature: bytes, key_id: str, keys: Sequence[Mapping[str, Any]]) -> bool:
    for key in keys:
        if key.get("kid") == key_id:
            encoded = str(key["x"])
            public = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
            try:
                Ed25519PublicKey.from_public_bytes(public).verify(signature, signed)
            except InvalidSignature:
                continue
            return True
    return False


def _decoded(text: Any) -> bytes:
    if not isinstance(text, str) or len(text) > _MAX_PAYLOAD_CHARACTERS:
        raise ValueError("invalid base64")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("invalid base64") from error


def _not_a_key_set(source: str, reason: str) -> LorryError:
    return LorryError("bad_key_set", source=source, reason=reason)
