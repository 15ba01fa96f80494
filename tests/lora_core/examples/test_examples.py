"""The library's examples work as documented."""

import inspect
import json
import logging
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

from lora_core.base_model.model import load_base
from lora_core.examples import two_adapters
from lora_core.examples.inputs import base_folder, text_rows
from lora_core.examples.two_adapters import train_two
from lora_core.peft_format.verify import verify_export
from tests import tiny_base

ROOT = Path(__file__).parents[3]


def test_two_adapters_train_on_a_generated_base_and_load_in_peft(tmp_path, capsys):
    torch.set_num_threads(1)

    assert two_adapters.main(["--out", str(tmp_path / "out")]) == 0

    assert_both_are_printed_and_loaded(capsys.readouterr().out, tmp_path / "out")


@pytest.mark.slow
def test_two_adapters_command_prints_no_library_warnings(tmp_path):
    command = [sys.executable, "-m", "lora_core.examples.two_adapters", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    assert done.returncode == 0, done.stderr
    assert "gemm_4bit_forward" not in done.stderr
    assert_both_are_printed_and_loaded(done.stdout, tmp_path / "out")


def assert_both_are_printed_and_loaded(printed: str, out: Path) -> None:
    assert printed.count("JobFinished") == 2
    for name, rank in (("narrow", 4), ("wide", 16)):
        assert f"{name}: {out / name}" in printed
        written = peft.LoraConfig.from_pretrained(str(out / name))
        assert written.r == rank  # pyright: ignore
        base_dir = written.base_model_name_or_path
        assert base_dir == str(out / "base")
        assert verify_export(load_base(str(base_dir), dtype="float32", device="cpu"), out / name).passed


def test_two_adapters_accept_a_folder_with_its_tokenizer(tmp_path):
    tiny_base._build(tmp_path / "source")
    torch.set_num_threads(1)
    source, out = tmp_path / "source", tmp_path / "out"

    assert two_adapters.main(["--base", str(source), "--out", str(out)]) == 0

    assert json.loads((out / "wide" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(source)
    base_dir = base_folder(source, tmp_path)
    assert text_rows(base_dir).input_ids.max() < tiny_base.VOCABULARY
    assert verify_export(load_base(base_dir, dtype="float32", device="cpu"), tmp_path / "out" / "wide").passed


def test_non_empty_output_folder_is_rejected_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(two_adapters, "train_two", pytest.fail)
    (tmp_path / "out" / "wide").mkdir(parents=True)

    assert two_adapters.main(["--out", str(tmp_path / "out")]) == 1

    message = capsys.readouterr().err
    assert f"{str(tmp_path / 'out')!r} is not empty" in message
    assert "--out" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["wide"]


def test_missing_base_is_reported(tmp_path, capsys):
    assert two_adapters.main(["--base", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_one_bitsandbytes_warning_is_suppressed(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "none")
    logger.warning("Something else.")

    assert caplog.messages == ["Something else."]


def test_the_example_is_short_enough_to_copy():
    assert len(inspect.getsource(train_two).splitlines()) < 30


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_adapters_accept_a_gguf_file(real_gguf, tmp_path):
    train_two(base_folder(real_gguf, tmp_path), tmp_path / "out", base_name="", num_steps=1)

    assert (tmp_path / "out" / "wide" / "adapter_model.safetensors").is_file()
