"""Token caches: one for each combination of project, data file, tokenizer, maximum length and data options.

A cache is charged to its project. A project keeps up to MAX_VARIANTS caches of each file. An evicted cache is computed
again when it is needed. Functions here that change the caches of a project hold its quota lock.
`catalog.maintenance.garbage_collection` deletes unneeded caches without that lock: the counters of stored bytes are
sums, and a deleted row is uncharged once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import rfc8785
from sqlalchemy import ColumnElement, Select, and_, delete, func, or_, select, union, update
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock, serialize, skip_locked, upsert
from catalog.spec.data import DataOptions
from catalog.spec.job import JobSpec
from catalog.states import UNFINISHED_STATES, JobState
from catalog.storage.manifest import Manifest, files_digest, hide_unused, lock_artifact, show_artifact
from catalog.tables.jobs import Job, Plan
from catalog.tables.storage import BaseModelRow, File, Prepared
from catalog.tables.table import Json
from catalog.usage import ledger

FORMAT = 2
"""Version of the preprocessing. Increase it when the same file would result in other tokens."""
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "generation_config.json",
    }
)
"""Files of a base model that determine how a conversation becomes tokens."""
MAX_VARIANTS = 4
"""How many caches of one file a project keeps, for different lengths, tokenizers or data options."""


def key(
    project_id: str, file_digest: str, tokenizer_digest: str, max_length: int, data: DataOptions | None = None
) -> str:
    """Return the cache's key: a digest of the project and of everything that determines the tokens.

    The kind of the rows is not part of it, because it follows from the file.
    """
    parts: Json = {
        "format": FORMAT,
        "project": project_id,
        "file": file_digest,
        "tokenizer": tokenizer_digest,
        "max_length": max_length,
    }
    if data is not None and data != DataOptions():
        parts["data"] = data.model_dump()
    return hashlib.sha256(rfc8785.dumps(parts)).hexdigest()


def tokenizer_digest(row: BaseModelRow) -> str:
    """Return the digest of the files that determine the tokens. Base models with equal files share token caches."""
    assert row.manifest is not None, "the base is ready"
    files = [file for file in row.manifest["files"] if file["path"] in TOKENIZER_FILES]
    return files_digest({"files": files})


def key_of(project_id: str, base: BaseModelRow, file: File, spec: JobSpec) -> str:
    """Return the key of a file's cache for jobs of the project with this spec. The cache may not exist yet."""
    return key(project_id, file.digest, tokenizer_digest(base), spec.max_length, spec.data)


def get(db: Database, key: str) -> Prepared | None:
    with db.read() as session:
        return session.get(Prepared, key)


def put(
    db: Database,
    key: str,
    *,
    project_id: str,
    file_digest: str,
    artifact: Manifest | None,
    report: Json,
    details: Json,
) -> Prepared:
    """Insert a cache whose files are stored, charge it to the project, and evict surplus caches of the same file.

    artifact: None if preparation was refused; the report then contains the reason.
    """
    with db.write() as session:
        serialize(session, f"quota {project_id}")
        now = read_clock(session)
        digest = show_artifact(session, artifact, now=now) if artifact else None
        before = session.get(Prepared, key, with_for_update=True)
        num_bytes = artifact.num_bytes if artifact else 0
        if before is not None:
            _uncharge(session, before, now=now)
        ledger.store(session, project_id, num_bytes, now=now)
        row: Json = {"key": key, "project_id": project_id, "file_digest": file_digest, "artifact": digest}
        row |= {"num_bytes": num_bytes, "evicted_at": None, "report": report, "details": details, "created_at": now}
        upsert(session, Prepared, [row])
        _evict_variants(session, project_id, file_digest, kept=key, now=now)
        return session.get_one(Prepared, key, populate_existing=True)


def forget(db: Database, key: str) -> None:
    """Delete a cache whose files are damaged. The next job that needs it prepares the file again."""
    with db.write() as session:
        row = session.execute(select(Prepared.project_id, Prepared.artifact).where(Prepared.key == key)).one_or_none()
        if row is None:
            return
        project_id, digest = row
        serialize(session, f"quota {project_id}")
        if digest is not None:
            lock_artifact(session, digest)  # before the row that refers to it, as `put` does
        # Only with this digest, because another worker may have replaced the cache with an intact one.
        gone = delete(Prepared).where(Prepared.key == key, Prepared.artifact.is_not_distinct_from(digest))
        num_bytes = session.scalar(gone.returning(Prepared.num_bytes)) or 0
        if digest is not None:
            ledger.store(session, project_id, -num_bytes, now=read_clock(session))
            hide_unused(session, digest)


def is_needed(project_id: str | None = None) -> ColumnElement[bool]:
    """In a query: an unfinished job, or a plan that is being computed, uses the cache. project_id: its owner, if known,
    which makes the query cheaper."""
    of_project = () if project_id is None else (Job.project_id == project_id,)
    used: list[Select[str]] = []
    for column in (Job.train_prepared, Job.valid_prepared):
        unfinished = (Job.state.in_(UNFINISHED_STATES), column.is_not(None), *of_project)
        used.append(select(column).where(*unfinished))  # pyright: ignore[reportArgumentType]
    for column in (Plan.train_prepared, Plan.valid_prepared):
        computing = (Plan.state == "computing", column.is_not(None))
        used.append(select(column).where(*computing))  # pyright: ignore[reportArgumentType]
    return or_(*(Prepared.key.in_(keys) for keys in used))


def evictable_bytes(session: Session, project_id: str) -> int:
    """Return the bytes of the project's caches that no job or plan currently needs."""
    return int(session.scalar(select(func.sum(Prepared.num_bytes)).where(_is_evictable(project_id))) or 0)


def evict(session: Session, project_id: str, num_bytes: int, *, now: float) -> None:
    """Evict unused caches of the project, the oldest first, until `num_bytes` are freed or no cache is left."""
    found = select(Prepared.key, Prepared.num_bytes).where(_is_evictable(project_id))
    keys: list[str] = []
    for name, size in session.execute(skip_locked(found.order_by(Prepared.created_at, Prepared.key))):
        if num_bytes <= 0:
            break
        keys.append(name)
        num_bytes -= size
    _evict(session, keys, now=now)


def promised_bytes(session: Session, project_id: str) -> int:
    """Return the size of the files whose caches the project's jobs and plans wait for, an estimate for the caches."""
    waiting = (Job.state == JobState.VALIDATING_FILES, Job.project_id == project_id)
    computing = (Plan.state == "computing", Plan.project_id == project_id)
    wanted = union(
        select(Job.train_prepared.label("key"), Job.training_file.label("file_id")).where(*waiting),
        select(Job.valid_prepared, Job.validation_file).where(*waiting),
        select(Plan.train_prepared, Plan.training_file).where(*computing),
        select(Plan.valid_prepared, Plan.validation_file).where(*computing),
    ).subquery()
    missing = select(wanted.c.key, func.max(File.num_bytes).label("num_bytes"))
    missing = missing.join(File, File.id == wanted.c.file_id).outerjoin(Prepared, Prepared.key == wanted.c.key)
    missing = missing.where(wanted.c.key.is_not(None), or_(Prepared.key.is_(None), Prepared.evicted_at.is_not(None)))
    return int(session.scalar(select(func.sum(missing.group_by(wanted.c.key).subquery().c.num_bytes))) or 0)


def is_any_missing(session: Session, keys: Iterable[str | None]) -> bool:
    """Return whether a worker still has to prepare one of these caches."""
    rows = [session.get(Prepared, key) for key in keys if key is not None]
    return any(row is None or (row.artifact is None and "refusal" not in row.report) for row in rows)


def _is_evictable(project_id: str) -> ColumnElement[bool]:
    of_project = and_(Prepared.project_id == project_id, Prepared.artifact.is_not(None))
    return and_(of_project, ~is_needed(project_id))


def _evict_variants(session: Session, project_id: str, file_digest: str, *, kept: str, now: float) -> None:
    of_file = (Prepared.project_id == project_id, Prepared.file_digest == file_digest, Prepared.artifact.is_not(None))
    num_excess = (session.scalar(select(func.count()).where(*of_file)) or 0) - MAX_VARIANTS
    if num_excess > 0:
        unused = select(Prepared.key).where(*of_file, Prepared.key != kept, ~is_needed(project_id))
        oldest = unused.order_by(Prepared.created_at, Prepared.key).limit(num_excess)
        _evict(session, list(session.scalars(skip_locked(oldest))), now=now)


def _evict(session: Session, keys: list[str], *, now: float) -> None:
    """Evict these caches. Their reports stay, because plans and jobs show them."""
    present = (Prepared.key.in_(keys), Prepared.artifact.is_not(None))
    gone = update(Prepared).where(*present).values(artifact=None, evicted_at=now)
    gone = gone.returning(Prepared.project_id, Prepared.num_bytes)
    for project_id, num_bytes in session.execute(gone, execution_options={"synchronize_session": False}).all():
        ledger.store(session, project_id, -num_bytes, now=now)


def _uncharge(session: Session, row: Prepared, *, now: float) -> None:
    if row.artifact is not None:
        ledger.store(session, row.project_id, -row.num_bytes, now=now)
