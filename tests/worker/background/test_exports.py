"""Exports on a worker: refusals, crashes, a full disk, cancellation and lost leases. The children are replaced."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from catalog.db.database import read_clock
from catalog.error_texts import ErrorText
from catalog.errors import StaleClaim
from catalog.exports import commands
from catalog.exports.formats import Needs
from catalog.storage import store as store_module
from catalog.storage.manifest import show_artifact
from catalog.tables.storage import AdapterExport, BaseModelRow
from catalog.tables.tenancy import Project
from catalog.tasks import task_queue
from catalog.tasks.task_queue import MAX_ATTEMPTS, TaskClaim, TaskKind
from tests.catalog.exports import test_model_card
from tests.catalog.world import attempts
from tests.worker.pack_site import PackSite
from worker.background import base_models, child_task, exports
from worker.background.exports import ScarceResources
from worker.background.task_runner import TaskDelayed, run_next
from worker.node import devices
from worker.protocol.mailbox import read_json, write_json

MEASURED = {
    "verification": {"max_abs_diff": 0.1, "tolerance": 0.2},
    "cost": {"base_seconds": 0.1, "merged_seconds": 0.098, "num_tokens": 128},
}
CONTENTS = ["README.md", "model.safetensors"]
Answer = Callable[[dict[str, Any]], None]


@pytest.fixture
def row(site: PackSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AdapterExport:
    """Return an export of an adapter that waits for a worker."""
    base_dir = tmp_path / "base"
    base_dir.mkdir()
    monkeypatch.setattr(base_models, "ensure", lambda *_, **__: base_dir)
    monkeypatch.setattr(devices, "free_host_bytes", lambda: 10**12)
    site.settings = site.settings.model_copy(update={"heartbeat_seconds": 1e-6})
    site.context.settings = site.settings
    adapter = site.world.complete(site.claim().claim_id)
    files = site.store.put_folder(site.files("made", "adapter_config.json", "{}"), kind="adapter")
    with site.db.write() as session:
        adapter = session.merge(adapter)
        adapter.artifact = show_artifact(session, files, now=read_clock(session))
        adapter.lineage = test_model_card.record()
    return commands.create(site.db, caller=site.world.caller, adapter=adapter.name, format="merged")


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Answer | None], None]]:
    """Return child(program, answer): each child runs the program, and `answer` has written its result before."""
    started: list[subprocess.Popen[bytes]] = []

    def install(program: str, answer: Answer | None = None) -> None:
        def run_child(_module: str, arguments: str, *, log_path: Path, box: Any) -> subprocess.Popen[bytes]:
            assert box.kind in ("export", "upload")
            if answer is not None:
                answer(read_json(Path(arguments)))
            with log_path.open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", program], stdout=log, stderr=log, start_new_session=True
                )
            started.append(process)
            return process

        monkeypatch.setattr(child_task, "run_child", run_child)

    yield install
    for process in started:
        process.kill()
        process.wait()


def writes(content: bytes = b"weights") -> Answer:
    def answer(request: dict[str, Any]) -> None:
        folder = Path(request["out_dir"])
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(content)
        write_json(Path(request["result"]), MEASURED)

    return answer


def reports(error: dict[str, str]) -> Answer:
    return lambda request: write_json(Path(request["result"]), {"error": error})


def shown(site: PackSite, row: AdapterExport) -> AdapterExport:
    return commands.get(site.db, project_id=row.project_id, adapter=row.adapter_id, export=row.id)


def error_of(site: PackSite, row: AdapterExport) -> dict[str, Any]:
    error = shown(site, row).error
    assert error is not None
    return error


def test_result_of_the_child_is_stored(site: PackSite, row: AdapterExport, child: Any) -> None:
    requests: list[dict[str, Any]] = []

    def answer(request: dict[str, Any]) -> None:
        requests.append(request)
        assert (Path(request["adapter_dir"]) / "adapter_config.json").read_text() == "{}"
        writes()(request)

    child("pass", answer)

    assert run_next(site.context, [TaskKind.EXPORT])
    assert not run_next(site.context, [TaskKind.EXPORT])

    done = shown(site, row)
    assert (done.status, done.verification) == ("succeeded", MEASURED["verification"])
    assert done.artifact is not None
    manifest = site.store.get_manifest(done.artifact)
    assert ([file.path for file in manifest.files], manifest.num_bytes) == (CONTENTS, done.num_bytes)
    card = b"".join(site.store.open_blob(manifest.files[0].digest)).decode()
    assert "| Inference latency, merged | 98 ms instead of 100 ms (98%)" in card
    assert "| Training memory, computed |" in card
    assert (requests[0]["format"], requests[0]["name"]) == ("merged", row.adapter_name)
    assert list(site.context.scratch_dir().iterdir()) == []


def test_refusal_of_the_child_fails_the_export_with_its_numbers(site: PackSite, row: AdapterExport, child: Any) -> None:
    error = {"code": "bad_adapter", "message": "Its logits differ by 3 of 1.", "remedy": "Use 'merged'."}
    child("pass", reports(error))

    assert run_next(site.context, [TaskKind.EXPORT])

    assert (shown(site, row).status, shown(site, row).error) == ("failed", error)


def test_crash_of_the_child_is_retried_and_names_its_last_line(
    site: PackSite, row: AdapterExport, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_queue, "FIRST_WAIT_SECONDS", 0)
    child("import sys; sys.exit('it broke')")

    for _ in range(MAX_ATTEMPTS[TaskKind.EXPORT]):
        assert shown(site, row).status == "queued"
        with pytest.raises(TaskDelayed):
            run_next(site.context, [TaskKind.EXPORT])

    error = shown(site, row).error
    assert error is not None
    assert error["code"] == "export_failed"
    assert "it broke" in error["message"]


def test_killed_child_counts_as_an_attempt(site: PackSite, row: AdapterExport, child: Any) -> None:
    child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")

    with pytest.raises(TaskDelayed):
        run_next(site.context, [TaskKind.EXPORT])

    assert attempts(site.db, row.id) == 1


@pytest.mark.parametrize("where", ["reported", "last line", "nowhere"])
def test_full_disk_fails_the_export_after_counted_attempts(
    site: PackSite, row: AdapterExport, child: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_queue, "FIRST_WAIT_SECONDS", 0)
    if where == "reported":
        child("pass", reports(ErrorText.of("worker_disk_full").report()))
    elif where == "nowhere":  # the child can write neither a result nor its log
        monkeypatch.setattr(devices, "is_disk_full", lambda _folder: True)
        child("raise SystemExit(1)")
    else:
        child("import sys; sys.exit('OSError: [Errno 28] No space left on device')")

    for _ in range(MAX_ATTEMPTS[TaskKind.EXPORT]):
        assert shown(site, row).status == "queued"
        with pytest.raises(TaskDelayed):
            run_next(site.context, [TaskKind.EXPORT])

    assert error_of(site, row)["code"] == "out_of_space"
    assert error_of(site, row)["message"] == "The disk on worker w1 is full. All 3 attempts have failed."
    assert list(site.context.scratch_dir().iterdir()) == []


def test_full_store_counts_as_an_attempt(
    site: PackSite, row: AdapterExport, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    child("pass", writes())

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(site.store, "put_folder", full)

    with pytest.raises(TaskDelayed):
        run_next(site.context, [TaskKind.EXPORT])

    assert (shown(site, row).status, attempts(site.db, row.id)) == ("queued", 1)
    assert list(site.context.scratch_dir().iterdir()) == []


@pytest.mark.parametrize(
    ("place", "code", "message"),
    [
        (
            "disk",
            "out_of_space",
            "needs about 40.0 kB of disk space for scratch files and the artifact store, but worker w1 has only",
        ),
        ("memory", "export_failed", "needs about 1.1 GB of memory, but worker w1 has only"),
    ],
)
def test_export_waits_for_a_worker_with_enough_resources(
    site: PackSite, row: AdapterExport, child: Any, monkeypatch: pytest.MonkeyPatch, place: str, code: str, message: str
) -> None:
    child("pass", writes())
    with monkeypatch.context() as patch:
        patch.setattr(exports, "REFUSAL_SECONDS", 0)
        if place == "disk":
            free = shutil.disk_usage(site.folder)._replace(free=40_001)  # two bytes belong to the adapter
            patch.setattr(shutil, "disk_usage", lambda _path: free)
        else:
            patch.setattr(devices, "free_host_bytes", lambda: 2**30)

        for _ in range(MAX_ATTEMPTS[TaskKind.EXPORT] + 1):
            assert not run_next(site.context, [TaskKind.EXPORT])

    assert (shown(site, row).status, attempts(site.db, row.id)) == ("queued", 0)
    assert error_of(site, row)["code"] == code
    assert re.search(message, error_of(site, row)["message"])
    assert list(site.context.scratch_dir().iterdir()) == []
    assert not run_next(site.context, [TaskKind.EXPORT]), "this worker has refused it"

    site.context.worker_id = "w2"
    site.context.refused_exports.clear()
    assert run_next(site.context, [TaskKind.EXPORT])
    assert (shown(site, row).status, shown(site, row).error) == ("succeeded", None)


def test_export_waits_for_a_worker_with_the_converter(site: PackSite, row: AdapterExport, child: Any) -> None:
    child("pass", writes())
    with site.db.write() as session:
        session.get_one(AdapterExport, row.id).format = "gguf"
        session.get_one(BaseModelRow, row.base_model).description = {"architecture": "Gemma3ForCausalLM"}

    assert not run_next(site.context, [TaskKind.EXPORT])

    assert error_of(site, row)["code"] == "unsupported_export"
    assert "needs llama.cpp's converter, which worker w1 lacks" in error_of(site, row)["message"]
    assert "Set LORRY_GGUF_CONVERTER" in error_of(site, row)["remedy"]
    site.context.worker_id = "w2"
    site.context.refused_exports.clear()
    site.context.settings = site.settings.model_copy(update={"gguf_converter": Path("convert_hf_to_gguf.py")})
    assert run_next(site.context, [TaskKind.EXPORT])
    assert (shown(site, row).status, shown(site, row).error) == ("succeeded", None)


def test_refused_export_is_logged_once(
    site: PackSite, row: AdapterExport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exports, "REFUSAL_SECONDS", 0)
    monkeypatch.setattr(devices, "free_host_bytes", lambda: 2**30)

    for _ in range(3):
        assert not run_next(site.context, [TaskKind.EXPORT])

    assert caplog.text.count(f"Export {row.id} waits for another worker.") == 1


def test_bucket_needs_no_disk_space(site: PackSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Needs(scratch_bytes=100, stored_bytes=1000, memory_bytes=0)
    free = shutil.disk_usage(tmp_path)._replace(free=150)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    given: dict[str, Any] = {"needs": needs, "worker_id": "w1", "scratch": tmp_path}

    exports.check_resources(**given, store=None, adapter_bytes=50)

    with pytest.raises(ScarceResources):
        exports.check_resources(**given, store=None, adapter_bytes=51)
    with pytest.raises(ScarceResources):
        exports.check_resources(**given, store=tmp_path, adapter_bytes=0)


def test_cancelled_export_stops_its_child(
    site: PackSite, row: AdapterExport, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel(_request: dict[str, Any]) -> None:
        commands.cancel(site.db, project_id=row.project_id, adapter=row.adapter_id, export=row.id)

    monkeypatch.setattr(child_task, "POLL_SECONDS", 0.01)
    child("import threading; threading.Event().wait()", cancel)

    with pytest.raises(StaleClaim):
        run_next(site.context, [TaskKind.EXPORT])

    assert (shown(site, row).status, shown(site, row).artifact) == ("cancelled", None)
    assert list(site.context.scratch_dir().iterdir()) == []


def test_worker_that_shuts_down_releases_the_export(
    site: PackSite, row: AdapterExport, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_task, "POLL_SECONDS", 0.01)
    child("import threading; threading.Event().wait()", lambda _request: site.context.shutdown.set())

    assert run_next(site.context, [TaskKind.EXPORT])

    assert (shown(site, row).status, attempts(site.db, row.id)) == ("queued", 0)


def test_lease_is_renewed_while_a_large_file_is_stored(
    site: PackSite, row: AdapterExport, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 1000)
    renewed: list[str] = []
    renew = child_task.task_queue.renew

    def counted(*arguments: Any, **options: Any) -> bool:
        renewed.append("")
        return renew(*arguments, **options)

    child("pass", writes(bytes(10_000)))
    monkeypatch.setattr(child_task.task_queue, "renew", counted)

    assert run_next(site.context, [TaskKind.EXPORT])

    assert shown(site, row).status == "succeeded"
    assert len(renewed) >= 20, "once for each chunk, which is read twice"


def test_export_that_is_lost_while_it_is_stored_is_not_recorded(
    site: PackSite, row: AdapterExport, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 1000)

    def lose(request: dict[str, Any]) -> None:
        writes(bytes(10_000))(request)
        commands.cancel(site.db, project_id=row.project_id, adapter=row.adapter_id, export=row.id)

    child("pass", lose)

    with pytest.raises(StaleClaim):
        run_next(site.context, [TaskKind.EXPORT])

    assert (shown(site, row).status, shown(site, row).artifact) == ("cancelled", None)


def test_export_beyond_the_quota_fails(site: PackSite, row: AdapterExport, child: Any) -> None:
    child("pass", writes())
    with site.db.write() as session:
        session.get_one(Project, row.project_id).max_stored_bytes = 1

    assert run_next(site.context, [TaskKind.EXPORT])

    error = shown(site, row).error
    assert error is not None
    assert error["code"] == "quota_exceeded"


@pytest.fixture
def upload(site: PackSite, row: AdapterExport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AdapterExport:
    """Return an export in the format merged that is uploaded."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    commands.cancel(site.db, project_id=row.project_id, adapter=row.adapter_id, export=row.id)
    given: dict[str, Any] = {"caller": site.world.caller, "adapter": row.adapter_id, "format": "merged"}
    site.settings = site.settings.model_copy(update={"hub_repositories": "org/*"})
    site.context.settings = site.settings
    return commands.create(site.db, **given, hub_repository="org/x", allowed_repositories=["org/*"])


class Children:
    """The children of an export with an upload. Each upload takes the next answer; a check takes `of_check`."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.of_check: dict[str, Any] = {"url": None}
        self.of_uploads: list[dict[str, Any]] = []

    def answer(self, request: dict[str, Any]) -> None:
        if "out_dir" in request:
            self.started.append("merge")
            writes()(request)
            return
        self.started.append("check" if request["folder"] is None else "upload")
        answer = self.of_check if request["folder"] is None else self.of_uploads.pop(0)
        write_json(Path(request["result"]), answer)


def refusal(code: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": "The Hub refused.", "remedy": "Do this."}}


@pytest.mark.parametrize(("code", "status"), [("hub_rejected", "failed"), ("hub_unreachable", "queued")])
def test_access_to_the_hub_is_checked_before_the_merge(
    site: PackSite, upload: AdapterExport, child: Any, code: str, status: str
) -> None:
    children = Children()
    children.of_check = refusal(code)
    child("pass", children.answer)

    with pytest.raises(TaskDelayed) if status == "queued" else nullcontext():
        run_next(site.context, [TaskKind.EXPORT])

    assert children.started == ["check"]
    assert shown(site, upload).status == status


def test_interrupted_upload_alone_is_repeated_with_the_lease_renewed(
    site: PackSite, upload: AdapterExport, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children()
    children.of_uploads = [refusal("hub_unreachable"), refusal("hub_unreachable"), {"url": "https://hub/1"}]
    child("pass", children.answer)
    monkeypatch.setattr(exports, "UPLOAD_PAUSES", (0.5, 0.5, 0.5))
    renewed: list[str] = []
    renew = child_task.task_queue.renew

    def counted(*arguments: Any, **options: Any) -> bool:
        renewed.append("")
        return renew(*arguments, **options)

    def pause(attempt: Any, seconds: float) -> None:
        before = len(renewed)
        wait(attempt, seconds)
        assert len(renewed) > before

    wait = exports._Attempt._wait  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(child_task.task_queue, "renew", counted)
    monkeypatch.setattr(exports._Attempt, "_wait", pause)  # pyright: ignore[reportPrivateUsage]

    assert run_next(site.context, [TaskKind.EXPORT])

    assert children.started == ["check", "merge", "upload", "upload", "upload"]
    done = shown(site, upload)
    assert (done.status, done.hub_url) == ("succeeded", "https://hub/1")


def test_long_outage_of_the_hub_fails_the_export_without_another_merge(
    site: PackSite, upload: AdapterExport, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children()
    children.of_uploads = [refusal("hub_unreachable")] * 3
    child("pass", children.answer)
    monkeypatch.setattr(exports, "UPLOAD_PAUSES", (0.01, 0.01))

    assert run_next(site.context, [TaskKind.EXPORT])

    assert children.started == ["check", "merge", *["upload"] * 3]
    assert (shown(site, upload).status, error_of(site, upload)["code"]) == ("failed", "hub_unreachable")
    assert not run_next(site.context, [TaskKind.EXPORT])


def test_upload_that_waits_ends_when_the_export_is_cancelled(
    site: PackSite, upload: AdapterExport, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children()
    children.of_uploads = [refusal("hub_unreachable")]

    def answer(request: dict[str, Any]) -> None:
        children.answer(request)
        if children.started[-1] == "upload":
            commands.cancel(site.db, project_id=upload.project_id, adapter=upload.adapter_id, export=upload.id)

    child("pass", answer)
    monkeypatch.setattr(exports, "UPLOAD_PAUSES", (3600.0,))

    with pytest.raises(StaleClaim):
        run_next(site.context, [TaskKind.EXPORT])

    assert shown(site, upload).status == "cancelled"


def test_worker_refuses_a_repository_that_its_own_settings_do_not_list(
    site: PackSite, upload: AdapterExport, child: Any
) -> None:
    site.context.settings = site.settings.model_copy(update={"hub_repositories": "other/*"})
    children = Children()
    child("pass", children.answer)

    assert run_next(site.context, [TaskKind.EXPORT])

    assert children.started == []
    assert (shown(site, upload).status, error_of(site, upload)["code"]) == ("failed", "integration_unavailable")


def test_lease_is_renewed_while_the_adapter_is_fetched_and_a_lost_one_ends_it(
    site: PackSite, row: AdapterExport, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children()
    child("pass", children.answer)
    read = site.store.open_blob
    renew, renewed = child_task.task_queue.renew, [""]

    def open_blob(digest: str) -> Iterator[bytes]:
        for byte in b"".join(read(digest)):
            commands.cancel(site.db, project_id=row.project_id, adapter=row.adapter_id, export=row.id)
            yield bytes([byte])

    def counted(*arguments: Any, **options: Any) -> bool:
        renewed.append("")
        return renew(*arguments, **options)

    monkeypatch.setattr(site.store, "open_blob", open_blob)
    monkeypatch.setattr(child_task.task_queue, "renew", counted)

    with pytest.raises(StaleClaim):
        run_next(site.context, [TaskKind.EXPORT])

    assert (shown(site, row).status, len(renewed), children.started) == ("cancelled", 2, [])
    assert list(site.context.scratch_dir().iterdir()) == []


def test_file_is_named_after_the_adapter_and_its_quantization() -> None:
    given = {"export_id": "e", "adapter_artifact": "a", "base_model": "b", "base_digest": "d"}
    claim = commands.ExportClaim(
        **given,
        task=TaskClaim(claim_id="c", kind=TaskKind.EXPORT, subject="e", num_attempts=1),
        lineage=None,
        adapter_name="ft:tiny:our project:../x:1",
        format="gguf",
        quantization="f16",
        hub_repository=None,
    )

    assert exports.file_stem(claim) == "ft-tiny-our-project-..-x-1-f16"
