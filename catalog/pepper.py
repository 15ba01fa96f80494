"""The pepper: the secret key for HMACs of API keys, and for stored secrets. It is not in the database.

During a rotation there are two peppers. New digests and secrets use the current one; those of the previous one stay
valid. A pepper is created only while no API keys exist, because a new one would invalidate all of them.

Secrets are sealed with AES-256-GCM under a key for each purpose, bound to one row's id. A copy in another row can't be
decrypted. `resealed` encrypts a secret again after a rotation.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import select

from catalog import disk
from catalog.db.database import Database
from catalog.disk import full_disk_named
from catalog.errors import Conflict, InvalidRequest
from catalog.settings import Settings
from catalog.tables.tenancy import ApiKey

MIN_BYTES = 32
"""Minimum length of LORRY_PEPPER. A new pepper has as many random bytes, in hexadecimal digits."""
FILE_NAME = "pepper"
PREVIOUS_FILE_NAME = "pepper.previous"
NEW = "LORRY_PEPPER=$(openssl rand -hex 32)"
NONCE_BYTES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Pepper:
    """The current and the previous pepper. `previous` is None except during a rotation. The repr shows neither."""

    current: bytes = field(repr=False)
    previous: bytes | None = field(default=None, repr=False)

    def digest(self, secret: str) -> str:
        """HMAC-SHA256 of a secret under the current pepper, in hex. The database stores it in place of the secret."""
        return self.digests(secret)[0]

    def digests(self, secret: str) -> list[str]:
        """The digests under which a secret may be stored, that of the current pepper first."""
        content = secret.encode("utf-8", "surrogatepass")
        return [hmac.new(pepper, content, hashlib.sha256).hexdigest() for pepper in self.all()]

    def all(self) -> list[bytes]:
        """The current pepper, then the previous one."""
        return [self.current] if self.previous is None else [self.current, self.previous]


def load(settings: Settings, db: Database) -> Pepper:
    """Load the pepper from the settings or from files in the data folder. Create it if no API keys exist yet.

    Raises InvalidRequest if the pepper is too weak or damaged, and Conflict if it is missing and API keys exist.
    Raises OutOfSpace and Unavailable.
    """
    previous = _previous(settings)
    if settings.pepper is not None:
        return Pepper(current=_checked(settings.pepper.get_secret_value()), previous=previous)
    path = settings.data_dir / FILE_NAME
    if not path.exists():
        if previous is None:
            _check_no_keys(db, path)
        with full_disk_named():
            _create_once(path, secrets.token_hex(MIN_BYTES).encode())  # text, so that LORRY_PEPPER can hold it too
    return Pepper(current=_read(path), previous=previous)


def known(settings: Settings) -> list[bytes]:
    """Return the peppers under which the audit chain may be sealed. Empty if this machine has none; creates none.

    Raises InvalidRequest as `load` does.
    """
    path = settings.data_dir / FILE_NAME
    if settings.pepper is None and not path.exists():
        return []
    current = _read(path) if settings.pepper is None else _checked(settings.pepper.get_secret_value())
    return Pepper(current=current, previous=_previous(settings)).all()


def backup_mark(pepper: bytes, name: str) -> str:
    """Return an HMAC that shows whether a machine has the pepper of the backup `name`, without revealing the pepper."""
    return hmac.new(pepper, f"backup {name}".encode(), hashlib.sha256).hexdigest()


def _previous(settings: Settings) -> bytes | None:
    """Return the previous pepper unchecked, because a value that was never the pepper matches nothing."""
    if settings.previous_pepper is not None and (named := settings.previous_pepper.get_secret_value()):
        return named.encode()
    path = settings.data_dir / PREVIOUS_FILE_NAME
    return _read(path) if path.exists() else None


def _checked(text: str) -> bytes:
    if not text:
        raise InvalidRequest("pepper_empty")
    if text != text.strip():
        raise InvalidRequest("pepper_begins_with_space" if text != text.lstrip() else "pepper_ends_with_space")
    if (num_bytes := len(text.encode())) < MIN_BYTES:
        raise InvalidRequest("weak_pepper", num_bytes=num_bytes, min_bytes=MIN_BYTES)
    return text.encode()


def _read(path: Path) -> bytes:
    pepper = path.read_bytes()
    if (num_bytes := len(pepper)) < MIN_BYTES:
        is_previous = path.name == PREVIOUS_FILE_NAME
        raise InvalidRequest(
            "pepper_file_damaged" if is_previous else "pepper_file_damaged_in_use",
            path=str(path),
            num_bytes=num_bytes,
            min_bytes=MIN_BYTES,
        )
    return pepper


def _check_no_keys(db: Database, path: Path) -> None:
    with db.read() as session:
        has_keys = session.scalar(select(ApiKey.id).limit(1)) is not None
    if has_keys and not path.exists():  # another process may have created both since: first the pepper, then the key
        raise Conflict("pepper_missing", path=str(path))


def _create_once(path: Path, content: bytes) -> None:
    """Create the file, or keep the one that another process has created at the same time."""
    disk.make_folder(path.parent)
    draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
    disk.sync(path.parent)  # before a key is made with it


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
