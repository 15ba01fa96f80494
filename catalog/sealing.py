"""Encryption of stored secrets with the pepper: AES-256-GCM under a key of their own purpose, bound to one row's id.

A copy of the ciphertext in another row can't be decrypted. To rotate the pepper, open a secret with all peppers and
seal it again with the current one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES = 12


def seal(secret: str, *, purpose: bytes, row_id: str, pepper: bytes) -> str:
    """Return the encrypted secret in Base64."""
    nonce = os.urandom(NONCE_BYTES)
    return base64.b64encode(nonce + _cipher(pepper, purpose).encrypt(nonce, secret.encode(), row_id.encode())).decode()


def unseal(sealed: str, *, purpose: bytes, row_id: str, peppers: Sequence[bytes]) -> str | None:
    """Return the secret, or None if none of the peppers has sealed it for this row."""
    content = base64.b64decode(sealed)
    for pepper in peppers:
        try:
            opened = _cipher(pepper, purpose).decrypt(content[:NONCE_BYTES], content[NONCE_BYTES:], row_id.encode())
        except InvalidTag:
            continue
        return opened.decode()
    return None


def _cipher(pepper: bytes, purpose: bytes) -> AESGCM:
    return AESGCM(hmac.digest(pepper, purpose, hashlib.sha256))
