"""Data reports are shown for the jobs whose base model they were made for."""

from __future__ import annotations

from catalog.jobs import data_reports
from catalog.lifecycle import preparation
from catalog.tables.storage import BaseModelRow
from tests.catalog.world import World, begin_preparation, sha

REFUSAL = {"refusal": {"code": "nothing_to_learn"}}
NOTHING = {"code": "nothing_to_learn", "message": "No row has tokens to train on. Add rows."}


def test_rejection_is_reported_for_its_model_only(world: World) -> None:
    world.base("other")
    with world.db.write() as session:
        tokenizer = {"path": "tokenizer.json", "digest": sha("other"), "num_bytes": 1}
        session.get_one(BaseModelRow, "other").manifest = {"files": [tokenizer]}
    refused = world.submit()
    unprepared = begin_preparation(world.db, "w1")
    assert unprepared is not None
    wanted = unprepared.files
    world.put_tokens(wanted.train_key, file_digest=wanted.training.digest, artifact=None, report=REFUSAL)
    preparation.refuse(world.db, unprepared.task, error=NOTHING)
    waiting = world.submit(model="other")

    of_file = {"project_id": world.caller.project_id, "file_id": world.file_id}
    assert data_reports.of_job(world.db, **world.of(refused.id)).training == REFUSAL
    assert data_reports.of_job(world.db, **world.of(waiting.id)).training is None
    assert data_reports.of_file(world.db, **of_file, model="smol") == REFUSAL
    assert data_reports.of_file(world.db, **of_file, model="other") is None


def test_each_file_of_a_rejected_job_keeps_its_report(world: World) -> None:
    job = world.submit(validation_file=world.file())
    unprepared = begin_preparation(world.db, "w1")
    assert unprepared is not None
    wanted = unprepared.files
    world.put_tokens(wanted.train_key, file_digest=sha("x"), artifact=None, report={"rows": 1})
    world.put_tokens(wanted.valid_key or "", file_digest=sha("y"), artifact=None, report=REFUSAL)

    preparation.refuse(world.db, unprepared.task, error=NOTHING)

    reports = data_reports.of_job(world.db, **world.of(job.id))
    assert (reports.training, reports.validation) == ({"rows": 1}, REFUSAL)
