"""State that file preparation leaves in the database. The tests replace the child process that makes tokens."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from catalog.error_texts import ErrorText
from catalog.errors import OutOfSpace
from catalog.states import EndReason
from catalog.storage import token_cache
from catalog.storage.manifest import DamagedArtifact
from catalog.storage.store import ArtifactStore
from catalog.tasks.task_queue import MAX_ATTEMPTS, TaskKind, retry_wait
from tests.catalog.world import sha
from tests.worker.pack_site import PackSite
from worker.background import base_models, child_task, tokenization
from worker.background.child_task import AttemptFailed
from worker.background.task_runner import RETRY_SECONDS, TaskDelayed, run_next

REFUSAL = {"code": "nothing_to_learn", "message": "There is nothing in it.", "remedy": "Give another."}
Child = Callable[..., dict[str, Any]]


def child(*, refuses: str) -> Child:
    """Return a child that rejects the file with this content, and makes tokens of any other file."""

    def run(_context: object, work: Path, source: Path, *_: object, **__: object) -> dict[str, Any]:
        (work / "details.json").write_text("{}")
        if source.read_text() == refuses:
            return {"rows": 1, "usable_rows": 0, "refusal": REFUSAL}
        (work / "tokens").mkdir(exist_ok=True)
        (work / "tokens" / "tokens.safetensors").write_text("the tokens")
        return {"rows": 8, "usable_rows": 8, "longest_example": 9}

    return run


@pytest.mark.parametrize("refused", ["training_file", "validation_file"])
def test_a_rejected_file_leaves_the_keys_of_both_files_on_the_job(
    site: PackSite, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    files = {"training_file": site.world.file(), "validation_file": site.world.file()}
    content = {sha(file_id): name for name, file_id in files.items()}

    def open_blob(_: ArtifactStore, digest: str) -> list[bytes]:
        return [content[digest].encode()]

    monkeypatch.setattr(ArtifactStore, "open_blob", open_blob)
    monkeypatch.setattr(base_models, "ensure", lambda *_, **__: Path("/nowhere"))
    monkeypatch.setattr(tokenization, "_run", child(refuses=refused))
    site.context.scratch_dir().mkdir(parents=True, exist_ok=True)
    job_id = site.world.submit(training_file=files["training_file"], validation_file=files["validation_file"]).id

    assert run_next(site.context, [TaskKind.PREPARATION])

    job = site.world.job(job_id)
    assert (job.state, job.error and job.error["code"]) == ("failed", "nothing_to_learn")
    assert job.error is not None
    assert job.error["param"] == refused
    assert job.valid_prepared is not None
    keys = {"training_file": job.train_prepared, "validation_file": job.valid_prepared}
    row = token_cache.get(site.db, keys[refused])
    assert row is not None
    assert row.report["refusal"] == REFUSAL
    assert site.held() == set()


def no_base(*_: object, **__: object) -> Path:
    raise AttemptFailed(ErrorText(code="import_failed", message="This machine lacks it.", remedy="Look at the source."))


def no_tokens(*_: object, **__: object) -> dict[str, Any]:
    raise AttemptFailed(ErrorText(code="preparation_failed", message="It crashed.", remedy="Look."))


def no_disk(*_: object, **__: object) -> dict[str, Any]:
    raise OSError(errno.EIO, "Input/output error")


def no_bytes(*_: object) -> list[bytes]:
    raise DamagedArtifact("object_changed", digest="0" * 64)


ENSURE, RUN = base_models.ensure, tokenization._run  # pyright: ignore[reportPrivateUsage]
HINDRANCES: dict[str, tuple[object, str, object]] = {
    "import_failed": (base_models, "ensure", no_base),
    "preparation_failed": (tokenization, "_run", no_tokens),
    "node_failed": (tokenization, "_run", no_disk),
    "artifact_damaged": (ArtifactStore, "open_blob", no_bytes),
}


@pytest.fixture
def fix_machine(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes every preparation succeed on this machine."""

    def fix() -> None:
        monkeypatch.setattr(ArtifactStore, "open_blob", lambda *_: [b"a file"])
        monkeypatch.setattr(base_models, "ensure", lambda *_, **__: Path("/nowhere"))
        monkeypatch.setattr(tokenization, "_run", child(refuses="no file"))

    fix()
    site.context.scratch_dir().mkdir(parents=True, exist_ok=True)
    return fix


@pytest.fixture(params=HINDRANCES)
def hindrance(request: pytest.FixtureRequest, fix_machine: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the code of a failure that one machine may cause."""
    where, name, does = HINDRANCES[request.param]
    monkeypatch.setattr(where, name, does)
    return request.param


def test_a_file_that_one_machine_cannot_prepare_waits_for_another(
    site: PackSite, hindrance: str, fix_machine: Callable[[], None]
) -> None:
    job_id = site.world.submit().id

    with pytest.raises(TaskDelayed):
        run_next(site.context, [TaskKind.PREPARATION])

    assert site.world.job(job_id).state == "validating_files"
    assert not run_next(site.context, [TaskKind.PREPARATION]), "not yet"
    site.world.clock.advance(RETRY_SECONDS + 1)
    fix_machine()
    assert run_next(site.context, [TaskKind.PREPARATION])
    assert site.world.job(job_id).state == "queued"


def test_a_file_that_no_machine_can_prepare_fails_after_backed_off_retries(site: PackSite, hindrance: str) -> None:
    job_id = site.world.submit().id

    waits: list[float] = []
    for _ in range(MAX_ATTEMPTS[TaskKind.PREPARATION]):
        assert site.world.job(job_id).state == "validating_files"
        with pytest.raises(TaskDelayed):
            run_next(site.context, [TaskKind.PREPARATION])
        waits.append((site.world.job(job_id).run_after or 0.0) - site.world.clock.now)
        site.world.clock.advance(retry_wait(MAX_ATTEMPTS[TaskKind.PREPARATION]))

    job = site.world.job(job_id)
    assert (job.state, job.reason, (job.error or {})["code"]) == ("failed", EndReason.INFRA_LOST, hindrance)
    assert f"All {MAX_ATTEMPTS[TaskKind.PREPARATION]} attempts have failed." in (job.error or {})["message"]
    assert [round(wait) for wait in waits[:-1]] == [10, 30, 90, 270]
    assert site.held() == set()


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_a_child(*_: object, **__: object) -> Any:
    raise OutOfSpace("disk_full_on_worker", worker_id="w1")


@pytest.mark.parametrize(
    ("where", "name", "does"),
    [
        (base_models, "_import", full),
        (tokenization, "_run", full),
        (child_task, "run", full_for_a_child),
    ],
)
def test_a_full_disk_counts_against_no_job(
    site: PackSite, fix_machine: Callable[[], None], monkeypatch: pytest.MonkeyPatch, where: Any, name: str, does: Any
) -> None:
    monkeypatch.setattr(base_models, "ensure", ENSURE if where is base_models else base_models.ensure)
    monkeypatch.setattr(tokenization, "_run", RUN if where is child_task else tokenization._run)
    monkeypatch.setattr(where, name, does)
    job_id = site.world.submit().id

    for _ in range(MAX_ATTEMPTS[TaskKind.PREPARATION] + 1):
        with pytest.raises(TaskDelayed):
            run_next(site.context, [TaskKind.PREPARATION])
        site.world.clock.advance(RETRY_SECONDS + 1)

    assert site.world.job(job_id).state == "validating_files"
