"""The library's examples do what they say."""

import inspect
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

from lora_core.base_model import load_base
from lora_core.examples.inputs import base_folder, text_rows
from lora_core.examples.two_adapters import train_two
from lora_core.verify import verify_export
from tests import tiny_base


def test_two_adapters_are_trained_by_one_command_and_loaded_by_peft(tmp_path):
    command = [sys.executable, "-m", "lora_core.examples.two_adapters", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("JobFinished") == 2
    base_dir = base_folder(None, tmp_path)
    for name, rank in (("narrow", 4), ("wide", 16)):
        assert verify_export(load_base(base_dir, dtype="float32", device="cpu"), tmp_path / "out" / name).passed
        assert peft.LoraConfig.from_pretrained(str(tmp_path / "out" / name)).r == rank  # pyright: ignore


def test_two_adapters_take_a_folder_and_its_tokenizer(tmp_path):
    tiny_base._build(tmp_path / "source")
    torch.set_num_threads(1)
    base_dir = base_folder(tmp_path / "source", tmp_path)

    train_two(base_dir, tmp_path / "out", num_steps=2)

    assert text_rows(base_dir).input_ids.max() < tiny_base.VOCABULARY
    assert verify_export(load_base(base_dir, dtype="float32", device="cpu"), tmp_path / "out" / "wide").passed


def test_the_example_is_short_enough_to_copy():
    assert len(inspect.getsource(train_two).splitlines()) < 30


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_adapters_take_a_gguf_file(real_gguf, tmp_path):
    train_two(base_folder(real_gguf, tmp_path), tmp_path / "out", num_steps=1)

    assert (tmp_path / "out" / "wide" / "adapter_model.safetensors").is_file()
