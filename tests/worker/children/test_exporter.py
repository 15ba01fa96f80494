"""The child that exports an adapter: the model that it writes ends its answers as the built-in engine does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests import tiny_base
from worker.children.exporter import export
from worker.children.tokenizer.text_encoder import BaseText

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose chat template ends turns with a token that its files do not name as an end."""
    plain = tiny_base.make(tmp_path_factory.mktemp("plain"))
    return tiny_base.without_end_of_turn(plain, tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def adapter_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), lora).save_pretrained(str(folder))
    return folder


def exported(base_dir: Path, adapter_dir: Path, folder: Path, **fields: Any) -> Path:
    """Export as a worker does. Returns the folder of the export."""
    arguments = {
        "adapter_dir": str(adapter_dir),
        "base_dir": str(base_dir),
        "out_dir": str(folder / "out"),
        "quantization": None,
        "name": "ft:x",
        "file_stem": "ft-x",
        "converter": None,
        "result": str(folder / "result.json"),
    }
    (folder / "arguments.json").write_text(json.dumps(arguments | fields))
    export(folder / "arguments.json")
    assert "error" not in json.loads((folder / "result.json").read_text())
    return folder / "out"


def test_merged_model_ends_answers_at_the_tokens_of_the_built_in_engine(
    base_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    out = exported(base_dir, adapter_dir, tmp_path, format="merged")

    merged: Any = AutoModelForCausalLM.from_pretrained(out)
    assert BaseText(base_dir).end_ids(as_chat=True) == {0, 2}
    assert merged.generation_config.eos_token_id == [0, 2]


def test_merged_model_without_a_chat_template_ends_answers_at_the_end_of_a_text(
    base_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    base = tiny_base.without_end_of_turn(base_dir, tmp_path / "base", template="")
    out = exported(base, adapter_dir, tmp_path, format="merged")

    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0


def test_modelfile_stops_at_the_tokens_of_the_built_in_engine(
    base_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    out = exported(base_dir, adapter_dir, tmp_path, format="gguf", quantization="f16")

    stops = [line for line in (out / "Modelfile").read_text().splitlines() if line.startswith("PARAMETER stop")]
    assert stops == ['PARAMETER stop "<|endoftext|>"', 'PARAMETER stop "<|im_end|>"']
