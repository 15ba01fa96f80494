"""The check of llama.cpp's converter at a worker's start, and its limits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from catalog.errors import UnfitWorker
from tests.worker.process import gguf_converter_program
from worker.process import gguf_converter
from worker.process.gguf_converter import ConverterFailed, check, run
from worker.process.sandbox import description, landlock_abi


def install(folder: Path, *, fault: str = "") -> Path:
    """Install the converter that stands in. Returns its path."""
    folder.mkdir()
    script = folder / "convert_hf_to_gguf.py"
    script.write_text(Path(gguf_converter_program.__file__).read_text())
    (folder / "fault").write_text(fault)
    return script


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gguf_converter, "find_spec", lambda _module: True)
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_converter_that_runs_passes_the_check(tmp_path: Path, scratch: Path) -> None:
    check(install(tmp_path / "llama.cpp"), scratch=scratch)

    assert list(scratch.iterdir()) == []


def test_missing_script_is_an_error_of_the_settings(tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(
        UnfitWorker, match=r"LORRY_GGUF_CONVERTER is '.*/none.py', but `none.py --help` fails: .*No such"
    ):
        check(tmp_path / "llama.cpp" / "none.py", scratch=scratch)


def test_last_line_of_a_converter_that_fails_is_named(tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(UnfitWorker, match=r"--help` fails: ValueError: the weights are from Mars\.$") as caught:
        check(install(tmp_path / "llama.cpp", fault="exit"), scratch=scratch)

    assert "with gguf-py next to it, or unset it" in caught.value.remedy


def test_missing_packages_are_named_with_the_command_that_installs_them(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_converter, "find_spec", lambda _module: None)

    with pytest.raises(UnfitWorker, match="this Python lacks sentencepiece protobuf") as caught:
        check(install(tmp_path / "llama.cpp"), scratch=scratch)

    assert "`pip install sentencepiece protobuf`" in caught.value.remedy


def test_package_that_lacks_its_parent_is_missing() -> None:
    assert not gguf_converter._is_installed("no_such_package.module")
    assert gguf_converter._is_installed("json.decoder")


@pytest.mark.skipif(landlock_abi() == 0, reason=description(0))
def test_converter_reads_no_files_outside_its_folder_and_the_model(tmp_path: Path, scratch: Path) -> None:
    script = install(tmp_path / "llama.cpp", fault="read")
    (tmp_path / "secret").write_text("secret")

    with pytest.raises(ConverterFailed, match=r"PermissionError: .*secret"):
        run(script, "--help", work=scratch, source=scratch)


@pytest.mark.parametrize("fault", ["memory", "memory of numpy", "memory of torch"])
def test_converter_that_needs_too_much_memory_is_no_error_of_the_model(
    tmp_path: Path, scratch: Path, fault: str
) -> None:
    with pytest.raises(MemoryError):
        run(install(tmp_path / "llama.cpp", fault=fault), "--help", work=scratch, source=scratch)


def test_converter_that_crashes_is_not_out_of_memory(tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(ConverterFailed, match="SIGSEGV"):
        run(install(tmp_path / "llama.cpp", fault="crash"), "--help", work=scratch, source=scratch)


def test_folder_with_the_data_of_lorry_is_refused(tmp_path: Path, scratch: Path) -> None:
    script = install(tmp_path / "llama.cpp")
    (tmp_path / "convert_hf_to_gguf.py").symlink_to(script)
    check(tmp_path / "convert_hf_to_gguf.py", scratch=scratch)

    with pytest.raises(UnfitWorker, match="its folder contains Lorry's data"):
        check(Path(shutil.copy(script, tmp_path / "other.py")), scratch=scratch)
