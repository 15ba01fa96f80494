"""No path that a trainer reports leads the worker out of the trainer's directory, even if that changes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.history.queries import attempts
from catalog.storage.manifest import DamagedArtifact
from tests.worker.pack_site import PASSED, READY, PackSite
from tests.worker.scripted_trainer import FakeTrainer, Script
from worker.protocol import mailbox
from worker.protocol.mailbox import TrainerDirectory
from worker.protocol.trainer_paths import UnsafePath, confined, delete, opened
from worker.session import job_logs
from worker.session.job_logs import LogFile

COMPONENTS = ("jobs", "c", "folder", "file", "link", "broken", "new", "..", ".", "", "~", "\0", "outside", "secret")
NAMES = st.one_of(
    st.lists(st.sampled_from(COMPONENTS), max_size=6).map("/".join),
    st.lists(st.sampled_from(COMPONENTS), max_size=4).map(lambda parts: "/" + "/".join(parts)),
    st.text(max_size=20),
    st.none() | st.integers() | st.lists(st.text(max_size=3), max_size=2),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


def tree(place: Path) -> Path:
    """Create a trainer's directory with links out of it, next to files that are not the trainer's."""
    root = place / "trainer"
    for folder in (root / "jobs" / "c" / "folder" / "folder", place / "outside" / "folder"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "file").write_text("content")
    for name, target in (("link", "../../../outside"), ("broken", "../../../nothing")):
        for folder in (root / "jobs" / "c", root / "jobs" / "c" / "folder"):
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(target)
    (place / "secret").write_text("secret")
    return root


def listing(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@given(name=NAMES)
def test_a_path_leads_into_the_directory_without_a_link_or_is_rejected(place: Path, name: object) -> None:
    root = tree(place)

    try:
        path = confined(root, name)
    except UnsafePath:
        return

    assert path == root / str(name)
    assert path.resolve() == root.resolve() / str(name)
    assert path != root
    assert root in path.parents


@given(name=NAMES)
def test_deleting_any_path_changes_nothing_outside_the_directory(place: Path, name: object) -> None:
    root = tree(place)
    before = listing(place / "outside"), (place / "secret").read_text()

    try:
        delete(root, name)
    except UnsafePath:
        assert root.is_dir()

    assert root.is_dir()
    assert (listing(place / "outside"), (place / "secret").read_text()) == before


def test_a_checked_folder_is_used_even_if_a_link_replaces_it(site: PackSite, tmp_path: Path) -> None:
    root, outside = tmp_path / "trainer", tmp_path / "outside"
    for folder, content in ((root / "jobs" / "c" / "saved", "own"), (outside / "c" / "saved", "secret")):
        folder.mkdir(parents=True)
        (folder / "row").write_text(content)
    own = site.store.put_folder(root / "jobs" / "c" / "saved", kind="checkpoint")

    with opened(root, "jobs/c/saved") as entry:
        (root / "jobs").rename(root / "renamed")
        (root / "jobs").symlink_to(outside)
        stored = site.store.put_folder(Path(entry.name), dir_fd=entry.dir_fd, kind="checkpoint")

    assert stored == own
    with pytest.raises(UnsafePath, match="link"):
        confined(root, "jobs/c/saved")
    with pytest.raises(UnsafePath, match="link"):
        delete(root, "jobs/c/saved")
    assert (outside / "c" / "saved" / "row").read_text() == "secret"


def linked(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def hard_linked(path: Path, secret: Path) -> None:
    path.hardlink_to(secret)


def folder_linked(path: Path, secret: Path) -> None:
    path.symlink_to(secret.parent, target_is_directory=True)


def pipe(path: Path, _secret: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [linked, hard_linked, folder_linked, pipe])
def test_only_plain_files_of_a_folder_are_stored(
    site: PackSite, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    secret, folder = tmp_path / "elsewhere" / "secret", tmp_path / "folder"
    secret.parent.mkdir()
    secret.write_text("secret")
    (folder / "inner").mkdir(parents=True)
    make(folder / "inner" / "weights", secret)

    with pytest.raises(DamagedArtifact, match=r"regular file|not a folder"):
        site.store.put_folder(folder, kind="adapter")


@pytest.mark.parametrize("make", [linked, hard_linked, pipe])
def test_a_log_that_was_replaced_is_neither_read_nor_truncated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, Path], None]
) -> None:
    monkeypatch.setattr(job_logs, "LONGEST_FILE_BYTES", 1)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    directory = TrainerDirectory.create(tmp_path / "trainer", {})
    make(directory.path / "log-1.txt", secret)
    file = LogFile(directory.path / "log-1.txt")

    read = file.read(0, 100)
    file.keep_short()

    assert (read, directory.log_tails(100)) == (b"", ["", ""])
    assert secret.read_text() == "secret"


def test_the_truncation_of_a_log_does_not_follow_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_logs, "LONGEST_FILE_BYTES", 1)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    log = tmp_path / "log.txt"
    log.write_text("printed")
    (tmp_path / "log.txt.1").symlink_to(secret)

    LogFile(log).keep_short()

    assert (secret.read_text(), log.read_text()) == ("secret", "printed")


def stored(site: PackSite) -> set[str]:
    return {entry.key for entry in site.store.objects.list_all("")}


HOSTILE = {
    "absolute": "{outside}",
    "parent": "jobs/{claim}/../../../../../outside",
    "other job": "jobs/claim-0/adapter",
    "trainer": "jobs",
    "number": 7,
    "link": "jobs/{claim}/link",
    "through a link": "jobs/{claim}/up/outside",
}


@pytest.mark.parametrize("path", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("event", ["exported", "checkpointed", "superseded", "paused"])
def test_a_trainer_that_reports_a_path_outside_its_job_is_killed(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], event: str, path: object
) -> None:
    """Nothing is published or deleted."""
    job = site.queued()
    outside = site.files("outside", "adapter_model.safetensors", "secret")
    before = stored(site)

    def reports(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        claim_id = (yield from trainer.listen("admit")).body["claim_id"]
        own = trainer.directory.job_path(claim_id)
        (own / "link").symlink_to(outside)
        (own / "up").symlink_to(site.folder)
        trainer.emit("admitted", claim_id=claim_id, step=0, num_steps=10, num_parameters=1, steps_per_epoch=1.0)
        yield
        named = path.format(outside=outside, claim=claim_id) if isinstance(path, str) else path
        about = {"claim_id": claim_id, "num_parameters": 1, "report": PASSED, "trained_tokens": 1}
        saved = {"kept_step": 5, "stopped_early": None}
        if event == "superseded":
            trainer.emit("checkpointed", step=4, folder=named, adapter=None, **about)
            for step in range(5, 5 + 10):
                folder = trainer.directory.checkpoint_path(claim_id, step)
                folder.mkdir(parents=True)
                (folder / "row").write_text("own")
                trainer.emit("checkpointed", step=step, folder=trainer.directory.named(folder), adapter=None, **about)
        elif event == "paused":
            trainer.emit("paused", step=5, adapter=named, **about)
        else:
            trainer.emit(event, step=5, folder=named, adapter=None, **about, **saved)
        for _ in range(20):
            yield

    (trainer, *_) = run(reports)

    found: list[Any] = attempts(site.db, **site.world.of(job.id))
    assert (outside / "adapter_model.safetensors").read_text() == "secret"
    assert stored(site) == before
    assert trainer.is_killed
    assert found[0].reason == "trainer_crashed"
    assert f"Trainer {found[0].trainer_id} on worker" in found[0].detail
    assert site.world.job(job.id).adapter_name is None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_an_error_of_the_node_is_not_an_unsafe_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "folder").mkdir()
    open_any = os.open

    def failing(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None:
            raise OSError(number, os.strerror(number))
        return open_any(path, flags, mode)

    monkeypatch.setattr(os, "open", failing)

    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        confined(tmp_path, "folder/file")


@pytest.mark.parametrize("name", ["a" * 300, "a/" + "b" * 300, "\ud800", "a/\udcff/b"])
def test_an_impossible_file_name_is_rejected(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()

    with pytest.raises(UnsafePath):
        confined(tmp_path, name)


def test_a_trainer_with_unreadable_events_is_killed_and_its_job_requeued(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]]
) -> None:
    job = site.queued()

    def garbles(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        yield from trainer.listen("admit")
        with trainer.directory.events_path.open("a") as file:
            file.write("no event\n")
        for _ in range(20):
            yield

    (trainer, *_) = run(garbles)

    found: list[Any] = attempts(site.db, **site.world.of(job.id))
    assert trainer.is_killed
    assert found[0].reason == "trainer_crashed"
    assert f"Trainer {found[0].trainer_id} on worker" in found[0].detail
    assert "is not valid JSON at column 1. No action is needed" in found[0].detail


def test_the_last_events_of_a_trainer_are_read_even_if_there_are_many(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox, "LONGEST_LINE_BYTES", 2000)
    job = site.queued()

    def ends(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        claim_id = (yield from trainer.listen("admit")).body["claim_id"]
        for _ in range(200):
            trainer.emit("idle")
        error = {"code": "bad", "message": "The last word.", "remedy": "None."}
        trainer.emit("refused", claim_id=claim_id, is_checkpoint=False, error=error)

    run(ends)

    found: list[Any] = attempts(site.db, **site.world.of(job.id))
    assert "The last word." in found[0].detail
