"""Sealed secrets: the stored format, texts that can't be decrypted, and rotation of the pepper."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from catalog.pepper import resealed, seal, unseal

OLD, NEW = b"o" * 32, b"n" * 32
PURPOSE = b"lorry: a test"


def sealed(secret: str, pepper: bytes) -> str:
    return seal(secret, purpose=PURPOSE, row_id="row", pepper=pepper)


def unsealed(text: str, *peppers: bytes, row_id: str = "row", purpose: bytes = PURPOSE) -> str | None:
    return unseal(text, purpose=purpose, row_id=row_id, peppers=peppers)


def test_stored_text_is_nonce_and_ciphertext_under_a_key_of_its_purpose() -> None:
    content = base64.b64decode(sealed("a sécret", OLD), validate=True)
    cipher = AESGCM(hmac.digest(OLD, PURPOSE, hashlib.sha256))

    assert cipher.decrypt(content[:12], content[12:], b"row").decode() == "a sécret"


def test_secret_opens_with_any_of_the_peppers_in_its_own_row_only() -> None:
    text = sealed("secret", OLD)

    assert unsealed(text, NEW, OLD) == "secret"
    assert unsealed(text, NEW) is None
    assert unsealed(text, OLD, row_id="another") is None
    assert unsealed(text, OLD, purpose=b"another") is None


@pytest.mark.parametrize("damage", ["", "AAAA", "no base64!", "é", "cut", "changed"])
def test_damaged_text_can_not_be_decrypted(damage: str) -> None:
    text = sealed("secret", OLD)
    damaged = {"cut": text[:-3], "changed": ("B" if text[0] == "A" else "A") + text[1:]}.get(damage, damage)

    assert unsealed(damaged, NEW, OLD) is None
    assert resealed(damaged, purpose=PURPOSE, row_id="row", peppers=[NEW, OLD]) is None


def test_resealed_secret_opens_with_the_current_pepper() -> None:
    text = sealed("secret", OLD)

    found = resealed(text, purpose=PURPOSE, row_id="row", peppers=[NEW, OLD])

    assert found is not None
    assert unsealed(found, NEW) == "secret"
    assert resealed(found, purpose=PURPOSE, row_id="row", peppers=[NEW, OLD]) == found, "current already"
    assert resealed(text, purpose=PURPOSE, row_id="row", peppers=[NEW]) is None
