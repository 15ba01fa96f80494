"""Runs of the real tracker libraries on this machine: each point is written once, despite interruptions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from catalog.db.database import Database
from catalog.history import tracker_runs
from catalog.lifecycle import recording
from catalog.settings import Settings
from catalog.tables.history import TrackerRunRow
from tests.catalog.world import World
from tests.worker_site import wait_until
from worker import trackers
from worker import trackers as run_session
from worker.children.tracker import WandbRun
from worker.process.launcher import child_environment
from worker.trackers import TrackerRunFailed, TrackerRunSession, available, places, writing_runs

WAIT_SECONDS = 240.0
"""Enough for a heavily loaded machine."""
OPTIONS: dict[str, dict[str, Any]] = {
    "wandb": {"project": "p", "name": "mine", "tags": ["a", "b"]},
    "mlflow": {"experiment": "e", "tags": {"team": "search"}},
    "tensorboard": {"name": "mine"},
}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackers, "POLL_SECONDS", 0.2)
    return Settings(data_dir=tmp_path)


@pytest.fixture
def world(db: Database) -> World:
    from tests.catalog.world import Clock

    return World(db, Clock())


@pytest.fixture
def db(tmp_path: Path, migrated_database: Path) -> Iterator[Database]:
    path = tmp_path / "lorry.db"
    path.write_bytes(migrated_database.read_bytes())
    database = Database(f"sqlite:///{path}")
    yield database
    database.close()


def training(world: World, *types: str) -> str:
    """Return a running job with runs in these trackers."""
    world.worker(integrations=tuple(OPTIONS))
    wanted = [{"type": name, name: OPTIONS[name]} for name in types]
    return world.running(integrations=wanted).job.id


def steps(world: World, job_id: str, *numbers: int) -> None:
    rows = [{"kind": "train", "step": step, "loss": 1.0 / step} for step in numbers]
    rows += [{"kind": "valid", "step": step, "loss": 2.0 / step} for step in numbers if step % 2 == 0]
    recording.record_metrics(world.db, world.job(job_id).claim_id or "", rows)


def row(world: World, job_id: str, name: str) -> TrackerRunRow:
    with world.db.read() as session:
        return session.get_one(TrackerRunRow, (job_id, name))


def written(world: World, job_id: str, step: int) -> Callable[[], bool]:
    return lambda: all(
        found.train_step >= step for name in OPTIONS if (found := _maybe(world, job_id, name)) is not None
    )


def _maybe(world: World, job_id: str, name: str) -> TrackerRunRow | None:
    with world.db.read() as session:
        return session.get(TrackerRunRow, (job_id, name))


@pytest.mark.slow
def test_every_tracker_receives_each_point_once_across_a_restart(
    world: World, settings: Settings, tmp_path: Path
) -> None:
    job_id = training(world, *OPTIONS)
    steps(world, job_id, 1, 2)
    with writing_runs(world.db, settings):
        wait_until(written(world, job_id, 2), seconds=WAIT_SECONDS)
    steps(world, job_id, 2, 3, 4)

    with writing_runs(world.db, settings):
        wait_until(written(world, job_id, 4), seconds=WAIT_SECONDS)
        adapter = world.complete(world.job(job_id).claim_id or "").name
        wait_until(lambda: all(row(world, job_id, name).finished_at for name in OPTIONS), seconds=WAIT_SECONDS)

    train = {1: 1.0, 2: 0.5, 3: 1 / 3, 4: 0.25}
    valid = {2: 1.0, 4: 0.5}
    for read in (in_tensorboard, in_mlflow, in_wandb):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from the libraries
            curves, texts = read(tmp_path, job_id)
        assert curves["train/loss"] == pytest.approx(train), read
        assert curves["valid/loss"] == pytest.approx(valid), read
        assert {"succeeded", adapter} <= set(texts.values()), read
    assert [event.level for event in world.events(job_id) if event.level != "info"] == []


Read = tuple[dict[str, dict[int, float]], dict[str, str]]


def in_tensorboard(data_dir: Path, job_id: str) -> Read:
    """Read the records of the format: a length, its checksum, an event, its checksum."""
    events = import_module("tensorboardX.proto.event_pb2")
    curves: dict[str, dict[int, float]] = {}
    texts: dict[str, str] = {}
    files = sorted((data_dir / "tensorboard" / "ours" / f"mine-{job_id}").iterdir())
    for content in (path.read_bytes() for path in files):
        at = 0
        while at < len(content):
            length = int.from_bytes(content[at : at + 8], "little")
            event = events.Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    _put(curves, value.tag, event.step, value.simple_value)
                else:
                    table = value.tensor.string_val[0].decode()
                    texts |= {cells[1]: json.loads(cells[2]) for line in table.splitlines() if (cells := _cells(line))}
    assert len(files) == 2
    return curves, texts


def _cells(line: str) -> list[str]:
    cells = [cell.strip() for cell in line.split("|")]
    return cells if len(cells) == 4 and cells[2].startswith('"') else []


def in_mlflow(data_dir: Path, job_id: str) -> Read:
    client = import_module("mlflow").MlflowClient(tracking_uri=f"sqlite:///{data_dir / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("ours/e").experiment_id])
    curves: dict[str, dict[int, float]] = {}
    for name in ("train/loss", "valid/loss"):
        for metric in client.get_metric_history(run.info.run_id, name):
            _put(curves, name, metric.step, metric.value)
    assert (run.info.status, run.data.params["lora.rank"], run.data.tags["team"]) == ("FINISHED", "16", "search")
    assert run.data.metrics["final.trained_tokens"] == 5
    return curves, run.data.tags


def in_wandb(data_dir: Path, job_id: str) -> Read:
    protocol = import_module("wandb.proto.wandb_internal_pb2")
    curves: dict[str, dict[int, float]] = {}
    texts: dict[str, str] = {}
    found = sorted((data_dir / "wandb").rglob("*.wandb"))
    for path in found:
        for data in _wandb_records(path.read_bytes()):
            record = protocol.Record.FromString(data)
            if record.HasField("run"):
                assert (record.run.run_id, record.run.project, list(record.run.tags)) == (
                    job_id,
                    "ours - p",
                    ["a", "b"],
                )
            values = {_key(item): json.loads(item.value_json) for item in record.history.item}
            for kind in ("train", "valid"):
                if f"{kind}/step" in values:
                    _put(curves, f"{kind}/loss", values[f"{kind}/step"], values[f"{kind}/loss"])
            texts |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
    assert len(found) == 2
    return curves, {name: value for name, value in texts.items() if isinstance(value, str)}


def _wandb_records(content: bytes) -> Iterator[bytes]:
    """Read LevelDB's log format: blocks of 32 KiB with pieces, each after its checksum, length and kind."""
    block, header = 1 << 15, 7
    at, record = header, b""
    assert content.startswith(b":W&B")
    while at + header <= len(content):
        left = block - at % block
        if left < header:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # a complete record, or its last piece
            yield record
            record = b""


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _put(curves: dict[str, dict[int, float]], name: str, step: int, value: float) -> None:
    curve = curves.setdefault(name, {})
    assert step not in curve, f"{name} has step {step} twice"
    curve[step] = value


def test_an_unavailable_tracker_adds_a_warning_and_the_other_continues(world: World, settings: Settings) -> None:
    away = settings.model_copy(update={"tensorboard_dir": Path(os.devnull) / "no folder"})
    job_id = training(world, "tensorboard", "wandb")
    steps(world, job_id, 1)

    with writing_runs(world.db, away):
        wait_until(
            lambda: row(world, job_id, "tensorboard").error and row(world, job_id, "wandb").train_step == 1,
            seconds=WAIT_SECONDS,
        )

    messages = [one.message for one in world.events(job_id) if one.level == "warn"]
    assert len(messages) == 1
    assert "Writing to the integration tensorboard failed" in messages[0]
    assert world.job(job_id).state == "running"


def test_a_crash_is_logged_as_one_of_the_tracker_thread(
    world: World, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(tracker_runs, "claim", crash)
    with writing_runs(world.db, settings):
        wait_until(lambda: caplog.records, seconds=WAIT_SECONDS)

    record = caplog.records[0]
    assert (record.threadName, record.message) == ("trackers", "Writing to trackers failed, and is retried.")


def test_a_run_whose_process_hangs_fails_and_leaves_no_process(settings: Settings) -> None:
    begun = {"type": "tensorboard", "run": _RUN, "run_id": None, "next_step": 0, "places": places(settings)}
    session = TrackerRunSession(begun)
    (child,) = [one for one in psutil.Process().children() if "worker.children.tracker" in one.cmdline()]

    child.suspend()
    hasty: Any = session
    hasty._answer_seconds = 0.2
    with pytest.raises(TrackerRunFailed, match="did not answer"):
        session.write([], None)
    session.close()

    assert not child.is_running()


_RUN: dict[str, Any] = {"job_id": "j", "project": "ours", "options": {"name": None}, "config": {}}


def test_errors_of_a_library_are_reported_without_secrets(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "canary")
    run = {**_RUN, "options": {"experiment": "e"}}
    wrong = {**places(settings), "mlflow": "canary://me:canary-too@nowhere"}

    with pytest.raises(TrackerRunFailed) as failed:
        TrackerRunSession({"type": "mlflow", "run": run, "run_id": None, "next_step": 0, "places": wrong})

    assert "…://…@nowhere" in str(failed.value)
    assert "canary" not in str(failed.value)


def test_credentials_reach_only_the_process_of_their_own_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "LORRY_PEPPER", "LORRY_DATABASE_URL", "HF_TOKEN"):
        monkeypatch.setenv(name, f"canary of {name}")

    def seen(environment: dict[str, str]) -> set[str]:
        return {name for name, value in environment.items() if value.startswith("canary")}

    environment = run_session._environment  # pyright: ignore[reportPrivateUsage]
    assert {name: seen(environment(name)) for name in run_session.LIBRARIES} == {
        "wandb": {"WANDB_API_KEY"},
        "mlflow": {"MLFLOW_TRACKING_TOKEN"},
        "tensorboard": set(),
    }
    assert seen(child_environment()) == set()


def test_a_worker_offers_trackers_that_are_installed_allowed_and_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run_session, "find_spec", lambda name: None if name == "mlflow" else object())

    def offered(**given: Any) -> tuple[str, ...]:
        return available(Settings(data_dir=tmp_path, **given))

    assert offered() == ("tensorboard",)
    assert offered(integrations="tensorboard, mlflow") == ("tensorboard",)
    assert offered(integrations="") == ()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert offered() == ("wandb", "tensorboard")


def test_a_wandb_run_uses_the_name_of_its_project_and_no_entity_of_the_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[dict[str, Any]] = []

    def init(**given: Any) -> SimpleNamespace:
        opened.append(given)
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Settings=dict, init=init))
    options = {"project": "p" * 128, "entity": "another-team", "name": None, "tags": None}

    WandbRun({"run": {**_RUN, "options": options}, "run_id": None, "places": {"wandb": str(tmp_path / "wandb")}})

    (given,) = opened
    assert given["project"] == f"ours - {'p' * 121}"
    assert given.get("entity") is None


def test_a_worker_imports_no_tracker_library() -> None:
    code = "import sys, worker.context.context, worker.children.tracker; print(*sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not {*run_session.LIBRARIES.values(), "torch"} & set(listed.stdout.split())
