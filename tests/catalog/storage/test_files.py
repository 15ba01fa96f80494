"""Uploaded files: what is stored, what is rejected, and that rejected uploads store nothing."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from catalog.db.database import Database
from catalog.errors import Conflict, InvalidRequest, LorryError, OutOfSpace, TooLarge, Unavailable
from catalog.maintenance import garbage_collection
from catalog.settings import Settings
from catalog.states import FINAL_STATES, JobState
from catalog.storage import files
from catalog.storage.store import ArtifactStore, open_store
from catalog.tables.jobs import Job
from catalog.tables.storage import Artifact, BaseModelRow, File, Prepared
from catalog.tables.tenancy import Organization, Project
from tests.services.small_disk import small_disk

ROW = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}).encode()


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    with database.write() as session:
        session.add(Organization(id="org", name="org", created_at=0))
        session.flush()
        for name in ("ours", "theirs"):
            session.add(Project(id=name, organization_id="org", name=name, created_at=0))
    yield database
    database.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.model_validate({"data_dir": tmp_path / "data", "max_file_bytes": 10_000})


@pytest.fixture
def store(settings: Settings) -> ArtifactStore:
    return open_store(settings)


class Uploader:
    """Spools the body and passes it on, as the API server does."""

    def __init__(self, db: Database, store: ArtifactStore, settings: Settings, spool: Path) -> None:
        self.db, self.store, self.settings, self.spool = db, store, settings, spool

    def __call__(self, content: bytes = ROW, **given: Any) -> File:
        self.spool.write_bytes(content)
        fields: dict[str, Any] = {
            "project_id": "ours",
            "purpose": "fine-tune",
            "filename": "train.jsonl",
            "num_bytes": len(content),
            "digest": sha256(content).hexdigest(),
        }
        return files.create(self.db, self.store, spooled=self.spool, settings=self.settings, **{**fields, **given})

    def nothing_was_kept(self) -> bool:
        with self.db.read() as session:
            return session.scalar(select(File)) is None and list(self.store.objects.list_all("")) == []


@pytest.fixture
def upload(db: Database, store: ArtifactStore, settings: Settings, tmp_path: Path) -> Uploader:
    return Uploader(db, store, settings, tmp_path / "spool")


def add_job(
    db: Database, *, training_file: str, validation_file: str | None, state: JobState, ident: str = "ftjob-1"
) -> str:
    base = BaseModelRow(name="base", kind="hub", source="a/b", state="ready", created_at=0)
    required: dict[str, Any] = {
        "project_id": "ours",
        "created_at": 0,
        "created_by": "key",
        "base_model": "base",
        "base_digest": "d",
        "pack_key": "p",
        "priority": 1,
        "requested": {},
        "spec": {},
        "train_prepared": "t",
        "attempt": 0,
        "counted_attempts": 0,
        "cancel_requested": False,
        "pause_requested": False,
    }
    columns = {column.name for column in Job.__table__.columns}
    required |= {name: False for name in ("lease_extended",) if name in columns}
    with db.write() as session:
        session.merge(base)
        session.flush()
        files_used = {"training_file": training_file, "validation_file": validation_file}
        session.add(Job(id=ident, state=state.value, **files_used, **required))
    return ident


def test_files_of_other_purposes_are_stored_unchanged(upload: Uploader) -> None:
    assert upload(b"\xff\x00", purpose="user_data").num_rows is None


def test_identical_uploads_are_two_files_and_one_blob(upload: Uploader, store: ArtifactStore) -> None:
    assert upload().id != upload().id
    assert len(list(store.objects.list_all("blobs"))) == 1


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a bad row": ({"content": ROW + b"\n{}"}, InvalidRequest, "invalid_row"),
    "an empty file": ({"content": b""}, InvalidRequest, "file_empty"),
    "an empty file of user data": ({"content": b"", "purpose": "user_data"}, InvalidRequest, "file_empty"),
    "an unknown purpose": ({"purpose": "vision\x1b"}, InvalidRequest, "wrong_file_kind"),
    "a result's purpose": ({"purpose": "fine-tune-results"}, InvalidRequest, "wrong_file_kind"),
    "too many bytes": ({"content": ROW + b" " * 10_000}, TooLarge, "file_too_large"),
    "other bytes than were sent": ({"digest": "0" * 64}, Unavailable, "upload_incomplete"),
}


@pytest.mark.parametrize(("given", "error", "code"), REFUSALS.values(), ids=REFUSALS)
def test_rejected_upload_leaves_no_file(
    upload: Uploader, db: Database, given: dict[str, Any], error: type[Exception], code: str
) -> None:
    with pytest.raises(error) as caught:
        upload(**given)

    assert getattr(caught.value, "code", None) == code
    assert files.list_page(db, project_id="ours").items == []
    assert code == "upload_incomplete" or upload.nothing_was_kept()


def test_rejected_upload_is_named(upload: Uploader) -> None:
    for content, purpose, problem, remedy in (
        (b"", "fine-tune", "is empty", "at least one row"),
        (b"", "user_data", "is empty", "at least one byte"),
        (ROW + b" " * 10_000, "user_data", "bytes, but the maximum is", "LORRY_MAX_FILE_BYTES"),
    ):
        with pytest.raises(LorryError, match=f"'notes.txt' .*{problem}") as caught:
            upload(content, purpose=purpose, filename="some/notes.txt")
        assert remedy in caught.value.remedy


def test_disk_that_fills_during_an_upload_keeps_nothing(db: Database, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 32_768) as disk:
        settings = Settings.model_validate({"data_dir": disk})
        upload = Uploader(db, open_store(settings), settings, tmp_path / "spool")

        with pytest.raises(OutOfSpace):
            upload((ROW + b"\n") * 2_000)

        assert upload.nothing_was_kept()


def test_failed_transaction_lists_no_file(upload: Uploader, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(session: Any) -> float:
        raise Unavailable("database_unavailable")

    with monkeypatch.context() as failing:
        failing.setattr(files, "read_clock", fail)
        with pytest.raises(Unavailable):
            upload()

    assert files.list_page(db, project_id="ours").items == []


def test_pages_follow_each_other_in_both_orders(upload: Uploader, db: Database) -> None:
    ids = [upload().id for _ in range(5)]
    upload(purpose="user_data")

    first = files.list_page(db, project_id="ours", limit=2, purpose="fine-tune")
    second = files.list_page(db, project_id="ours", limit=2, purpose="fine-tune", after=first.items[-1].id)
    last = files.list_page(db, project_id="ours", limit=2, purpose="fine-tune", after=second.items[-1].id)
    forward = files.list_page(db, project_id="ours", limit=10, purpose="fine-tune", order="asc")

    assert [file.id for page in (first, second, last) for file in page.items] == [file.id for file in ordered(forward)]
    assert (first.has_more, second.has_more, last.has_more) == (True, True, False)
    assert {file.id for file in forward.items} == set(ids)


def ordered(page: Any) -> list[File]:
    return sorted(page.items, key=lambda file: (file.created_at, file.id), reverse=True)


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("role", ["training_file", "validation_file"])
def test_file_of_an_unfinished_job_cannot_be_deleted(
    upload: Uploader, db: Database, state: JobState, role: str
) -> None:
    file, other = upload(), upload()
    used = {"training_file": other.id, "validation_file": other.id, role: file.id}
    job = add_job(db, **used, state=state)

    if state in FINAL_STATES:
        assert files.delete(db, project_id="ours", file_id=file.id).deleted_at
        return
    with pytest.raises(Conflict, match=job) as caught:
        files.delete(db, project_id="ours", file_id=file.id)
    assert caught.value.code == "in_use"


def test_refused_deletion_of_a_file_names_up_to_three_of_its_jobs(upload: Uploader, db: Database) -> None:
    file = upload()

    def refused(*jobs: str) -> Conflict:
        for job in jobs:
            add_job(db, training_file=file.id, validation_file=None, state=JobState.QUEUED, ident=job)
        with pytest.raises(Conflict) as caught:
            files.delete(db, project_id="ours", file_id=file.id)
        return caught.value

    both, all_four = refused("a", "b"), refused("c", "d")

    assert both.message == f"File {file.id} is in use by job a and job b, which have not finished."
    assert both.remedy == "Wait until all of them finish, or cancel them, then delete the file."
    assert "by job a, job b, job c and others, which have not" in all_four.message


def test_cleanup_keeps_referenced_blobs(upload: Uploader, db: Database, store: ArtifactStore) -> None:
    kept, deleted, needed = upload(), upload(ROW + b"\n"), upload(ROW + b"\n\n")
    shown, hidden = (store.put_bytes(content) for content in (b"shown", b"hidden"))
    add_job(db, training_file=needed.id, validation_file=None, state=JobState.PAUSED)
    with db.write() as session:
        session.add(Artifact(digest=shown.digest, kind="tokens", files=[], num_bytes=0, created_at=0))
        session.flush()
        of_kept = {"file_digest": kept.digest, "artifact": shown.digest, "report": {}, "created_at": 0}
        session.add(Prepared(key="k", project_id="ours", details={}, **of_kept))
        session.get_one(File, needed.id).deleted_at = 1.0
    files.delete(db, project_id="ours", file_id=deleted.id)

    assert garbage_collection.live_digests(db) == {kept.digest, needed.digest, shown.digest}
    assert garbage_collection.clean(db, store) == 0
    assert garbage_collection.clean(db, store, grace_seconds=-60) == 2
    left = {entry.key.rsplit("/", 1)[-1] for entry in store.objects.list_all("blobs")}
    assert left == {kept.digest, needed.digest, shown.digest}
    assert hidden.digest not in left


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("train.jsonl", "train.jsonl"),
        ("/home/anna/train.jsonl", "train.jsonl"),
        ("C:\\data\\train.jsonl", "train.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("a\r\nb\0\u202e.jsonl", "a__b__.jsonl"),
        ("Grüße 世界.jsonl", "Grüße 世界.jsonl"),
        ("x" * 500, "x" * 200),
        ("", "file"),
        ("..", "file"),
        ("/", "file"),
    ],
)
def test_filename_is_reduced_to_a_safe_label(given: str, kept: str) -> None:
    assert files.label(given) == kept
