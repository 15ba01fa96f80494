"""Encrypts stored secrets with the pepper: AES-256-GCM under a key for each purpose, bound to one row's id.

A copy of the ciphertext in another row can't be decrypted. `resealed` encrypts a secret again after a rotation of the
pepper.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Sequence
from contextlib import suppress

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES = 12


def seal(secret: str, *, purpose: bytes, row_id: str, pepper: bytes) -> str:
    """Return the encrypted secret in Base64."""
    nonce = os.urandom(NONCE_BYTES)
    return base64.b64encode(nonce + _cipher(pepper, purpose).encrypt(nonce, secret.encode(), row_id.encode())).decode()


def unseal(sealed: str, *, purpose: bytes, row_id: str, peppers: Sequence[bytes]) -> str | None:
    """Return the secret, or None if none of the peppers has sealed it for this row, or if `sealed` is damaged."""
    for pepper in peppers:
        with suppress(InvalidTag, ValueError):  # ValueError: damaged Base64, or too short for a nonce
            content = base64.b64decode(sealed, validate=True)
            opened = _cipher(pepper, purpose).decrypt(content[:NONCE_BYTES], content[NONCE_BYTES:], row_id.encode())
            return opened.decode()
    return None


def resealed(sealed: str, *, purpose: bytes, row_id: str, peppers: Sequence[bytes]) -> str | None:
    """Return the secret encrypted with the current pepper: `sealed` itself if it is. None if it can't be decrypted.

    peppers: the current one first.
    """
    if unseal(sealed, purpose=purpose, row_id=row_id, peppers=peppers[:1]) is not None:
        return sealed
    secret = unseal(sealed, purpose=purpose, row_id=row_id, peppers=peppers[1:])
    return None if secret is None else seal(secret, purpose=purpose, row_id=row_id, pepper=peppers[0])


def _cipher(pepper: bytes, purpose: bytes) -> AESGCM:
    return AESGCM(hmac.digest(pepper, purpose, hashlib.sha256))
