"""Whether database and store are sound and fit together: integrity, foreign keys, every artifact, the audit chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.db.database import Database
from catalog.maintenance import audit_anchors
from catalog.maintenance.backup import integrity, references
from catalog.storage.manifest import DamagedArtifact, Manifest
from catalog.storage.store import ArtifactStore, blob_key, manifest_key
from catalog.tables import Adapter, Artifact, File


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What was read and computed anew."""

    num_artifacts: int
    num_objects: int
    num_audit_events: int
    problems: list[str]


def check(db: Database, store: ArtifactStore, *, peppers: Sequence[bytes]) -> Checked:
    """Read every object that the record names, and verify the audit chain and its anchors. Raises Unavailable.

    peppers: where none is known, of the chain only the order is verified.
    Where the database is damaged, that alone is reported: what it says of anything else can't be trusted.
    """
    if damage := integrity.damage(db):
        return Checked(num_artifacts=0, num_objects=0, num_audit_events=0, problems=damage)
    with db.read() as session:
        keys = references.named(session)
        artifacts = list(session.scalars(select(Artifact)))
    damaged = references.damaged(keys, store.objects)
    with db.read() as session:
        problems = integrity.orphans(db) + _of_artifacts(session, artifacts, damaged) + _of_files(session, damaged)
        num_events, misfits = _of_chain(db, store, peppers)
    told = {sentence for sentence in damaged.values() if not any(sentence in problem for problem in problems)}
    return Checked(
        num_artifacts=len(artifacts),
        num_objects=len(keys),
        num_audit_events=num_events,
        problems=[*problems, *sorted(told), *misfits],
    )


def _of_artifacts(session: Session, artifacts: list[Artifact], damaged: Mapping[str, str]) -> list[str]:
    names = {row.artifact: row.name for row in session.execute(select(Adapter.artifact, Adapter.name))}
    problems: list[str] = []
    for row in artifacts:
        name = names.get(row.digest) or f"The artifact {row.digest} ({row.kind})"
        keys = [*(blob_key(file["digest"]) for file in row.files), manifest_key(row.digest)]
        problems += [f"{name}: {damaged[key]}" for key in keys if key in damaged]
        if not _is_itself(row):
            problems.append(f"{name}: its row names other files than its manifest.")
    return problems


def _is_itself(row: Artifact) -> bool:
    try:
        return Manifest.from_rows(row.kind, row.files).digest == row.digest
    except DamagedArtifact:
        return False


def _of_files(session: Session, damaged: Mapping[str, str]) -> list[str]:
    there = session.execute(select(File.id, File.digest).where(File.deleted_at.is_(None)))
    return [f"{row.id}: {damaged[blob_key(row.digest)]}" for row in there if blob_key(row.digest) in damaged]


def _of_chain(db: Database, store: ArtifactStore, peppers: Sequence[bytes]) -> tuple[int, list[str]]:
    """How many sealed events there are, and what doesn't fit."""
    num_events = 0
    while True:
        found = audit_anchors.verify(db, store.objects, peppers=peppers, after=num_events)
        num_events += found.num_events
        if found.misfit is not None:
            of = f" ({found.misfit.id})" if found.misfit.id else ""
            return num_events, [f"The audit chain does not fit at {found.misfit.link}{of}: {found.misfit.fault}."]
        if not found.has_more:
            return num_events, []
