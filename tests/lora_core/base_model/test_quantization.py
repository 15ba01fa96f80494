"""4-bit and 8-bit bases: the invariants of plain bases hold, and PEFT serves the adapter on the same base."""

import json
import shutil
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from catalog.resources.memory import BaseModelMemory
from lora_core.base_model.model import BaseModel, describe_base, load_base
from lora_core.base_model.quantization import quantization_config
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import UnsupportedModel
from lora_core.forward.language_model import run_evaluation, run_training
from lora_core.packing.packed_batch import SliceInput, build_pack
from lora_core.peft_format.verify import verify_export
from tests.lora_core.scenarios import (
    Submission,
    admit,
    config,
    dataset,
    run_alone,
    run_elastically,
    state_bytes,
    submissions,
)

bitsandbytes = pytest.importorskip("bitsandbytes")
KINDS = ["nf4", "int8"]
JOB = Submission(config=config(num_steps=6, learning_rate=2e-2), train=dataset(1, [20, 33, 15]))


def load(
    base_dirs: dict[str, Path],
    family: str,
    kind: Literal["nf4", "int8"],
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> BaseModel:
    return load_base(base_dirs[family], dtype=dtype, device="cpu", quantization=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_pickled_weights_are_rejected_without_being_read(base_dirs, tmp_path, kind, monkeypatch):
    folder = tmp_path / "pickled"
    shutil.copytree(base_dirs["llama"], folder)
    (folder / "model.safetensors").unlink()
    torch.save(load_file(base_dirs["llama"] / "model.safetensors"), folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))

    with pytest.raises(UnsupportedModel, match="no safetensors weights"):
        load_base(folder, dtype="bfloat16", device="cpu", quantization=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_a_quantized_base_logs_nothing(base_dirs, caplog, kind):
    engine = Engine(load(base_dirs, "llama", kind), EngineConfig())
    admit(engine, "job", JOB)
    caplog.clear()

    engine.tick()

    assert caplog.messages == []


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("llama", "float32"), ("gpt2", "bfloat16")])
def test_adapter_of_a_quantized_base_is_verified_and_names_its_base(base_dirs, tmp_path, family, dtype, kind):
    base = load(base_dirs, family, kind, dtype)
    engine = Engine(base, EngineConfig())
    admit(engine, "job", JOB)
    while not engine.idle:
        engine.tick()
    report = engine.export("job", tmp_path / "adapter", base_name="tiny")

    verdict = verify_export(base, tmp_path / "adapter")

    assert verdict.passed, verdict
    assert verdict.max_abs_effect > 3 * verdict.tolerance
    assert report.quantization == kind
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        how = json.loads(file.metadata()["base_quantization_config"])
    assert (how["load_in_4bit"], how["load_in_8bit"]) == (kind == "nf4", kind == "int8")


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_equals_solo_on_a_quantized_base(base_dirs, family, kind):
    base = load(base_dirs, family, kind)
    # DoRA, PiSSA and OLoRA need unquantized base weights
    jobs = {
        name: job
        for name, job in submissions(family).items()
        if not (job.config.lora.use_dora or job.config.lora.subtracts_start)
    }

    packed = run_elastically(base, jobs, token_budget=4096, seed=1, victim="none", num_lanes=2)

    assert Engine(base, EngineConfig()).invariance == "bitwise"
    for name, job in jobs.items():
        assert packed[name] == run_alone(base, job), name


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted_on_a_quantized_base(base_dirs, tmp_path, kind):
    engine = Engine(load(base_dirs, "llama", kind), EngineConfig())
    admit(engine, "job", JOB)
    while engine.progress("job")[0] < 3:
        engine.tick()
    engine.save_checkpoint("job", tmp_path / "checkpoint")

    resumed = Engine(load(base_dirs, "llama", kind), EngineConfig())
    admit(resumed, "job", JOB, resume_from=tmp_path / "checkpoint")
    for each in (engine, resumed):
        while not each.idle:
            each.tick()

    assert state_bytes(resumed, "job") == state_bytes(engine, "job")


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_pass_does_not_change_gradients_of_later_passes(base_dirs, kind):
    base = load(base_dirs, "llama", kind)
    engine = Engine(base, EngineConfig())
    admit(engine, "job", JOB)
    adapter = engine._jobs["job"].adapter
    adapter.p.add_(0.01)
    adapter.refresh_compute()
    part = SliceInput(adapter=adapter, sequences=(JOB.train.row(1),), label_weight=1.0, dropout=None)
    pack = build_pack([part], device="cpu")
    run_training(base, pack)
    before = adapter.g.clone()
    adapter.g.zero_()

    run_evaluation(base, pack)
    run_training(base, pack)

    assert all(views.grad_a_RD.any() for views in adapter.sites.values())
    assert torch.equal(adapter.g, before)


@pytest.mark.parametrize("kind", KINDS)
def test_outlier_of_a_packmate_changes_no_result(base_dirs, kind):
    base = load(base_dirs, "llama", kind)
    linear = base.model.get_submodule("model.layers.0.mlp.up_proj")
    torch.manual_seed(0)
    x_TD = torch.randn(64, 64, dtype=torch.bfloat16)
    loud_TD = x_TD.clone()
    loud_TD[32:] *= 1000

    quiet, with_outlier = linear.forward(x_TD)[:32], linear.forward(loud_TD)[:32]

    assert torch.equal(quiet, with_outlier)


def test_base_bytes_include_quantized_weights_and_their_scales(base_dirs):
    plain = load_base(base_dirs["llama"], dtype="bfloat16", device="cpu")
    shapes = [plain.model.get_parameter(f"{name}.weight").shape for name in plain.linear_names()]
    linears, rows, num_linears = sum(shape.numel() for shape in shapes), sum(shape[0] for shape in shapes), len(shapes)
    others = plain.num_bytes - 2 * linears

    nf4, int8 = load(base_dirs, "llama", "nf4"), load(base_dirs, "llama", "int8")
    before = int8.num_bytes
    Engine(int8, EngineConfig())

    blocks, tables = linears // 64, num_linears * (4 * 16 + 4 * 256 + 4)  # the two code books, the offset
    second = 4 * num_linears  # one block of 256 each, at this size
    assert nf4.num_bytes == others + linears // 2 + blocks + second + tables
    assert int8.num_bytes == before == others + linears + 4 * rows


def test_missing_bitsandbytes_is_rejected_with_the_extra_to_install(base_dirs, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnsupportedModel) as caught:
        load(base_dirs, "llama", "nf4")
    assert "quant" in caught.value.remedy


def test_nf4_matches_qlora_and_int8_has_no_outlier_columns():
    nf4 = quantization_config("nf4", torch.bfloat16)
    assert (nf4.bnb_4bit_quant_type, nf4.bnb_4bit_use_double_quant) == ("nf4", True)
    assert quantization_config("int8", torch.bfloat16).llm_int8_threshold == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("llama", "float32"), ("gpt2", "bfloat16")])
def test_estimated_bytes_match_those_of_a_loaded_quantized_base(base_dirs, family, dtype, kind):
    """The service estimates the bytes from the description alone, before anything is loaded."""
    estimated = BaseModelMemory(describe_base(base_dirs[family]), dtype, kind).weight_bytes()

    assert estimated == pytest.approx(load(base_dirs, family, kind, dtype).num_bytes, rel=0.02)
