"""Offline verification of an adapter in a local folder.

manifest.json lists the files with their digests; its own digest is the artifact's. lineage.json contains the record,
which names the artifact; the record's digest is the lineage id.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self, cast

import rfc8785

from lorry.errors import BadDownload, LorryError
from lorry.verification import signatures

MANIFEST = "manifest.json"
LINEAGE = "lineage.json"
_PIECE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """A file of the manifest. `digest` is the SHA-256 of its bytes, in hex."""

    path: str
    digest: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """The service's description of an adapter. Its manifest has been checked against the artifact's digest."""

    name: str
    files: Mapping[str, FileEntry]
    kind: str
    artifact: str
    lineage: Mapping[str, Any]

    @classmethod
    def of(cls, *, name: str, manifest: Mapping[str, Any], artifact: str, lineage: Mapping[str, Any]) -> Self:
        """Parse the service's responses. Raises BadDownload for a path outside the folder, or a wrong digest."""
        entries = _entries(manifest.get("data"), where=f"The service's manifest for adapter {name}", name=name)
        files = {entry.path: entry for entry in entries}
        contents = cls(name=name, files=files, kind=str(manifest.get("kind")), artifact=artifact, lineage=lineage)
        if not contents.matches_artifact():
            raise BadDownload("manifest_of_another_adapter", name=name)
        return contents

    def matches_artifact(self) -> bool:
        try:
            return _canonical_digest(self.manifest()) == self.artifact
        except ValueError:
            return False

    def manifest(self) -> dict[str, Any]:
        """Return the manifest. The artifact's digest is that of its canonical JSON."""
        rows = [
            {"path": entry.path, "digest": entry.digest, "num_bytes": entry.num_bytes}
            for entry in sorted(self.files.values(), key=lambda entry: entry.path)
        ]
        return {"files": rows, "kind": self.kind}

    def write_records(self, folder: Path) -> None:
        (folder / MANIFEST).write_bytes(rfc8785.dumps(self.manifest()))
        (folder / LINEAGE).write_text(self._lineage_text(), "utf-8")

    def update_lineage(self, folder: Path) -> None:
        """Replace the lineage record atomically if it differs."""
        text, path = self._lineage_text(), folder / LINEAGE
        if path.read_text("utf-8") != text:
            temporary = folder / f".{LINEAGE}.{os.getpid()}"
            temporary.write_text(text, "utf-8")
            temporary.replace(path)

    def _lineage_text(self) -> str:
        return json.dumps(self.lineage, indent=2, ensure_ascii=False) + "\n"


def check_free(target: Path, *, name: str) -> None:
    """Raises LorryError if the target exists and is not an empty folder."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise LorryError("target_exists", target=str(target), name=name)


def holds(target: Path, contents: Contents) -> bool:
    """Return whether `target` contains exactly this adapter."""
    try:
        kept = _canonical_digest(json.loads((target / MANIFEST).read_bytes()))
    except (OSError, ValueError):
        return False
    return kept == contents.artifact and verify_folder(target)["passed"]


def verify_folder(folder: Path, *, keys: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Verify a pulled folder offline: files against the manifest, record against its id, and the record's signature.

    `keys`: the service's public keys (signatures.read_keys). Without them, only digests are checked, and `signature` is
    `not_checked`. With them it is `valid`, `invalid`, or `unknown_key` if it was made with none of the keys.
    `key_retired_at` (Unix time) is set if the key of a valid signature was retired. `problems` are sentences. Raises
    LorryError for a folder that has neither a manifest nor a record.
    """
    if not any((folder / name).exists() for name in (MANIFEST, LINEAGE)):
        raise LorryError("no_adapter", folder=str(folder))
    try:
        manifest = _object(folder / MANIFEST)
        lineage = _object(folder / LINEAGE)
        entries = _entries(manifest.get("files"), where=MANIFEST)
        artifact = _canonical_digest(manifest)
    except LorryError as error:
        return _result([error.sentence()], signature="not_checked")
    except ValueError as error:
        return _result([f"{MANIFEST} has no canonical form: {error}."], signature="not_checked")
    problems = [problem for entry in entries if (problem := _file_problem(folder, entry))]
    known = {entry.path for entry in entries} | {MANIFEST, LINEAGE}
    problems += [f"{path} is not in the manifest." for path in _paths(folder) if path not in known]
    problems += lineage_problems(lineage, artifact)
    if keys is None:
        return _result(problems, signature="not_checked")
    status, problem = signatures.check(
        lineage.get("signature"), lineage_id=lineage.get("lineage_id"), artifact=artifact, keys=keys
    )
    result = _result([*problems, *([problem] if problem else [])], signature=status)
    retired_at = signatures.key_retired_at(lineage["signature"], keys) if status == "valid" else None
    return result if retired_at is None else {**result, "key_retired_at": retired_at}


def read_lineage(folder: Path) -> dict[str, Any]:
    """Return the lineage record of a pulled folder, unverified. Raises LorryError if there is none."""
    return _object(folder / LINEAGE)


def lineage_problems(lineage: Mapping[str, Any], artifact: str) -> list[str]:
    """Return the problems of a record: it must match its id and name the artifact."""
    held: object = lineage.get("lineage")
    if not isinstance(held, dict):
        return [f"{LINEAGE} contains no record."]
    record = cast("dict[str, Any]", held)
    problems: list[str] = []
    try:
        if _canonical_digest(record) != lineage.get("lineage_id"):
            problems.append("The lineage record does not match its ID.")
    except ValueError as error:
        return [f"The lineage record has no canonical form: {error}."]
    if artifact not in json.dumps(record.get("outputs", record)):
        problems.append("The lineage record belongs to other files: it does not contain the digest of their manifest.")
    return problems


def _canonical_digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON (RFC 8785), in hex, as the service computes it.

    Raises ValueError for a value without one: NaN, an integer beyond 2^53 - 1, a lone surrogate, or deep nesting.
    """
    try:
        return hashlib.sha256(rfc8785.dumps(value)).hexdigest()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while piece := source.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def is_safe(path: str) -> bool:
    """Return whether the path is relative and stays inside its folder, on any system."""
    parts = path.split("/")
    return (
        path.isprintable()
        and not any(part in {"", ".", ".."} or part.endswith((" ", ".")) for part in parts)
        and not any(character in path for character in '\\:*?"<>|')
    )


def _entries(entries: object, *, where: str, name: str = "NAME") -> list[FileEntry]:
    if not isinstance(entries, list) or not all(isinstance(row, dict) for row in cast("list[object]", entries)):
        raise BadDownload("bad_manifest", where=where, name=name)
    return [_entry(row, number, where, name) for number, row in enumerate(cast("list[dict[str, Any]]", entries), 1)]


def _entry(entry: Mapping[str, Any], number: int, where: str, name: str) -> FileEntry:
    path, digest = entry.get("path"), entry.get("digest")
    num_bytes = entry.get("num_bytes", entry.get("bytes"))
    if not (isinstance(path, str) and isinstance(digest, str) and isinstance(num_bytes, int)):
        raise BadDownload("bad_manifest_entry", where=where, number=number, name=name)
    is_reserved = path in {MANIFEST, LINEAGE}
    if is_reserved or not is_safe(path):
        raise BadDownload("reserved_file_name" if is_reserved else "unsafe_path", where=where, path=path, name=name)
    return FileEntry(path=path, digest=digest, num_bytes=num_bytes)


def _object(path: Path) -> dict[str, Any]:
    try:
        parsed: object = json.loads(path.read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise LorryError("unreadable", path=str(path), reason=str(reason)) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            raise LorryError("unreadable_json_at", path=str(path), lineno=error.lineno, colno=error.colno) from error
        raise LorryError("unreadable_json", path=str(path)) from error
    if not isinstance(parsed, dict):
        raise LorryError("unreadable_not_object", path=str(path))
    return cast("dict[str, Any]", parsed)


def _file_problem(folder: Path, entry: FileEntry) -> str | None:
    path = folder / entry.path
    if path.is_symlink() or not path.is_file():
        return f"{entry.path} is missing."
    if path.stat().st_size != entry.num_bytes:
        return f"{entry.path} has {path.stat().st_size} bytes, but the manifest lists {entry.num_bytes}."
    return None if digest_of(path) == entry.digest else f"{entry.path} does not match its digest."


def _paths(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(str(PurePosixPath(path.relative_to(folder))) for path in found)


def _result(problems: list[str], *, signature: str) -> dict[str, Any]:
    return {"object": "adapter.verification", "passed": not problems, "problems": problems, "signature": signature}
