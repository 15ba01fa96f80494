"""Signs lineage records: Ed25519, as DSSE envelopes of in-toto statements.

Digests show that a record and its files belong together. A signature shows that this service issued them. The key is
derived from the server secret (pepper), so there is no second secret to store, and the database does not hold it.
Sources: DSSE v1 (github.com/secure-systems-lab/dsse), in-toto Statement v1, RFC 8037 (Ed25519 in JSON Web Keys).
"""

from __future__ import annotations

import base64
import hashlib

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from catalog.tables.table import Json

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:lorry:lineage:1"
_KEY_PURPOSE = b"lorry lineage signing key, Ed25519, version 1"


def sign_lineage(*, lineage_id: str, artifact: str, pepper: bytes) -> Json:
    """Return the DSSE envelope for one adapter.

    lineage_id: sha256 of the lineage record's RFC 8785 form. artifact: sha256 of the adapter's manifest. The caller has
    checked that both belong to the record (lineage.verify). Equal arguments give equal bytes.
    """
    key = _private_key(pepper)
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": "manifest.json", "digest": {"sha256": artifact}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"lineage_id": lineage_id},
    }
    payload = rfc8785.dumps(statement)
    signature = key.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": _key_id(_public_bytes(key)), "sig": base64.b64encode(signature).decode()}],
    }


def public_key(pepper: bytes) -> Json:
    """Return the public key as a JSON Web Key (RFC 8037)."""
    public = _public_bytes(_private_key(pepper))
    encoded = base64.urlsafe_b64encode(public).rstrip(b"=").decode()
    return {"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": _key_id(public), "x": encoded}


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """Return the PAE of DSSE v1: the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _private_key(pepper: bytes) -> Ed25519PrivateKey:
    seed = HKDF(algorithm=SHA256(), length=32, salt=None, info=_KEY_PURPOSE).derive(pepper)
    return Ed25519PrivateKey.from_private_bytes(seed)


def _public_bytes(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _key_id(public: bytes) -> str:
    """Return an id for a key. It identifies the key but proves nothing."""
    return hashlib.sha256(public).hexdigest()[:32]
