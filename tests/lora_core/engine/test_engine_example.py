"""The example in the engine's module docstring."""

from __future__ import annotations

import doctest
from dataclasses import fields

from peft import LoraConfig
from safetensors.numpy import save_file

from lora_core.engine import engine as engine_module
from tests.lora_core.scenarios import dataset


def test_example_in_the_engine_module_prints_the_documented_output(base_dirs, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base_dirs["llama"])
    for seed, name in enumerate(("first", "second")):
        tokens = dataset(seed, [20, 30, 40])
        vectors = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
        save_file({name: vector for name, vector in vectors.items() if vector is not None}, f"{name}.safetensors")

    result = doctest.testmod(engine_module)

    assert result.attempted >= 7
    assert result.failed == 0
    assert LoraConfig.from_pretrained("adapter").base_model_name_or_path == "base"
