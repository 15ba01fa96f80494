"""How a worker computes a plan: it records details and overlap of the files, then the plan is ready."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catalog.error_texts import ErrorText
from catalog.errors import OutOfSpace, Unavailable
from catalog.plans import plans
from catalog.storage import token_cache
from catalog.storage.manifest import DamagedArtifact
from catalog.storage.store import ArtifactStore
from catalog.tables.jobs import Plan
from catalog.tasks import task_queue
from catalog.tasks.task_queue import MAX_ATTEMPTS, TaskClaim, TaskKind, retry_wait
from tests.catalog.plan_data import plan
from tests.catalog.prepared_data import DETAILS, REPORT
from tests.catalog.world import begin_plan
from tests.worker.pack_site import PackSite
from worker.background import base_models, child_task, task_runner, tokenization
from worker.background.child_task import AttemptFailed
from worker.background.task_runner import RETRY_SECONDS, TaskDelayed, run_next
from worker.children.tokenizer.token_file import TokenFile
from worker.context.context import WorkerContext

REFUSAL = {"code": "nothing_to_learn", "message": "There is nothing in it.", "remedy": "Give another."}


@pytest.fixture
def made(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Prepare each file as the same two rows; return the folders in order."""
    folders: list[Path] = []

    def run(_context: object, work: Path, *_: object, **__: object) -> dict[str, Any]:
        folders.append(work)
        (work / "details.json").write_text(json.dumps(DETAILS))
        (work / "tokens").mkdir(exist_ok=True)
        with TokenFile(work / "tokens" / "tokens.safetensors") as out:
            for row in ([1, 2], [3]):
                out.add_row(np.array(row, dtype=np.int32), np.ones(len(row), dtype=np.uint8))
            out.finish()
        return REPORT

    monkeypatch.setattr(ArtifactStore, "open_blob", _open_blob_of_files(ArtifactStore.open_blob))
    monkeypatch.setattr(base_models, "ensure", lambda *_, **__: Path("/nowhere"))
    monkeypatch.setattr(tokenization, "_run", run)
    site.context.scratch_dir().mkdir(parents=True, exist_ok=True)
    return folders


def _open_blob_of_files(original: Any) -> Any:
    """Return an `open_blob` that gives empty content for uploads, which are not in the test's store."""

    def open_blob(store: ArtifactStore, digest: str) -> Any:
        try:
            return iter(list(original(store, digest)))
        except Exception:  # noqa: BLE001
            return iter([b""])

    return open_blob


def get_plan(site: PackSite, row: Plan) -> Plan:
    return plans.get(site.db, project_id=site.world.caller.project_id, plan_id=row.id)


def test_a_plan_is_ready_once_both_files_are_prepared_and_compared(site: PackSite, made: list[Path]) -> None:
    row = plan(site.world, validation_file=site.world.file())

    assert run_next(site.context, [TaskKind.PLAN])

    computed = get_plan(site, row)
    assert (computed.state, len(made)) == ("ready", 2)
    assert (computed.found or {})["data"]["overlap"] == {"rows": 2, "of_rows": 2}
    assert plans.details(site.db, computed).training == DETAILS
    assert not run_next(site.context, [TaskKind.PLAN])
    assert list(site.context.scratch_dir().iterdir()) == []


def test_a_rejected_file_fails_its_plan(site: PackSite, made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_context: object, work: Path, *_: object, **__: object) -> dict[str, Any]:
        (work / "details.json").write_text(json.dumps(DETAILS))
        return REPORT | {"usable_rows": 0, "refusal": REFUSAL}

    monkeypatch.setattr(tokenization, "_run", refuse)
    row = plan(site.world)

    assert run_next(site.context, [TaskKind.PLAN])

    assert (get_plan(site, row).error or {})["code"] == "nothing_to_learn"


def test_a_store_outage_delays_the_plan_until_a_retry(
    site: PackSite, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Unavailable(ErrorText(code="store_unavailable", message="The store does not answer.", remedy="Wait."))

    monkeypatch.setattr(tokenization, "prepare_files", fail)
    row = plan(site.world)

    with pytest.raises(Unavailable):
        run_next(site.context, [TaskKind.PLAN])

    assert get_plan(site, row).state == "computing"
    assert begin_plan(site.db, "w1") is None, "not yet"
    site.world.clock.advance(RETRY_SECONDS + 1)
    assert begin_plan(site.db, "w1") is not None


def test_a_plan_whose_files_crash_the_tokenizer_fails_after_retries(
    site: PackSite, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise AttemptFailed(ErrorText(code="preparation_failed", message="It failed.", remedy="Look."))

    monkeypatch.setattr(tokenization, "_run", crash)
    row = plan(site.world)

    for number in range(1, MAX_ATTEMPTS[TaskKind.PLAN] + 1):
        assert get_plan(site, row).state == "computing"
        with pytest.raises(TaskDelayed):
            run_next(site.context, [TaskKind.PLAN])
        site.world.clock.advance(retry_wait(number) - 1)
        assert not run_next(site.context, [TaskKind.PLAN]), "not yet"
        site.world.clock.advance(2)

    assert get_plan(site, row).state == "failed"
    assert (get_plan(site, row).error or {})["code"] == "preparation_failed"


def test_a_failed_comparison_is_reported_with_both_files_and_the_worker(
    site: PackSite, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_module: str, *_: object, log_path: Path, **__: object) -> subprocess.Popen[bytes]:
        log_path.write_text("KeyError\n")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"], start_new_session=True)

    monkeypatch.setattr(child_task, "run_child", crash)
    row = plan(site.world, validation_file=site.world.file())

    for _ in range(MAX_ATTEMPTS[TaskKind.PLAN]):
        with pytest.raises(TaskDelayed):
            run_next(site.context, [TaskKind.PLAN])
        site.world.clock.advance(3600)

    error = get_plan(site, row).error or {}
    assert error["code"] == "preparation_failed"
    assert error["message"].startswith(
        f"The comparison of files {row.training_file} and {row.validation_file} on worker {site.context.worker_id} "
        "failed with exit status 7: KeyError. "
    )


def test_a_full_disk_during_the_comparison_counts_against_no_plan(
    site: PackSite, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutOfSpace("disk_full_on_worker", worker_id="w1")

    row = plan(site.world, validation_file=site.world.file())
    with monkeypatch.context() as patch:
        patch.setattr(child_task, "run", full)
        for _ in range(MAX_ATTEMPTS[TaskKind.PLAN] + 1):
            with pytest.raises(TaskDelayed):
                run_next(site.context, [TaskKind.PLAN])
            site.world.clock.advance(RETRY_SECONDS + 1)
    assert get_plan(site, row).state == "computing"

    assert run_next(site.context, [TaskKind.PLAN])

    assert get_plan(site, row).state == "ready"


def test_damaged_tokens_are_recomputed_when_a_plan_compares_them(
    site: PackSite, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> None:
        raise DamagedArtifact("object_changed", digest="0" * 64)

    row = plan(site.world, validation_file=site.world.file())
    with monkeypatch.context() as patch:
        patch.setattr(ArtifactStore, "fetch", damaged)
        with pytest.raises(TaskDelayed):
            run_next(site.context, [TaskKind.PLAN])
    assert token_cache.get(site.db, row.train_prepared) is None
    site.world.clock.advance(RETRY_SECONDS + 1)

    assert run_next(site.context, [TaskKind.PLAN])

    assert (get_plan(site, row).state, len(made)) == ("ready", 3)


def test_preparations_for_jobs_and_plans_alternate(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[TaskKind] = []

    def handle(context: WorkerContext, task: TaskClaim) -> bool:
        order.append(task.kind)
        with context.db.write() as session:
            task_queue.finish(session, task)
        return True

    kinds = (TaskKind.PREPARATION, TaskKind.PLAN)
    monkeypatch.setattr(task_runner, "HANDLERS", dict.fromkeys(kinds, handle))
    with site.db.write() as session:
        for number in range(2 * len(kinds)):
            kind, project_id = kinds[number // 2], site.world.caller.project_id
            task_queue.add(session, kind, f"t{number}", project_id=project_id, run_after=number)

    while run_next(site.context, kinds):
        site.world.clock.advance(1)

    first, second = order[:2]
    assert {first, second} == set(kinds)
    assert order == [first, second, first, second]
