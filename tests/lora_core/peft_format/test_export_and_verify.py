"""Exports are served by PEFT as trained, and verification rejects damaged files and other base models."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from lora_core.errors import BadAdapter, OutOfMemory
from lora_core.peft_format import verify
from lora_core.peft_format.verify import verify_export
from tests.lora_core.exports import JOB, snapshot, trained
from tests.lora_core.scenarios import Submission, config, dataset, weights


def targets_of(family: str) -> list:
    partial = {"llama": ("q_proj", "layers.1.mlp.up_proj"), "gpt2": ("attn.c_proj", "c_fc")}[family]
    return ["all-linear", partial]


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_served_equals_trained_under_peft_on_the_resident_base(load, tmp_path, family, dtype, rslora):
    base = load(family, dtype)
    for index, targets in enumerate(targets_of(family)):
        job = config(num_steps=6, learning_rate=2e-2, targets=targets)
        job = replace(job, lora=replace(job.lora, use_rslora=rslora))
        engine = trained(base, replace(JOB, config=job))
        report = engine.export("job", tmp_path / f"{index}", base_name="tiny")

        verdict = verify_export(base, tmp_path / f"{index}")

        assert verdict.passed, verdict
        assert verdict.num_positions == 4
        assert verdict.max_abs_effect > 3 * verdict.tolerance
        assert report.num_parameters == engine.job("job").adapter.num_parameters
        assert report.dtype == dtype


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_is_served_by_peft_as_trained_including_its_magnitudes(load, tmp_path, family, dtype, dropout):
    base = load(family, dtype)
    job = config(num_steps=6, learning_rate=2e-2, dropout=dropout)
    job = replace(job, lora=replace(job.lora, use_dora=True))
    trained(base, replace(JOB, config=job)).export("job", tmp_path / "adapter", base_name="tiny")

    assert verify_export(base, tmp_path / "adapter").passed
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    magnitudes = {name: tensor * 1.3 for name, tensor in tensors.items() if name.endswith("lora_magnitude_vector")}
    assert len(magnitudes) * 3 == len(tensors)
    save_file(tensors | magnitudes, path)
    assert not verify_export(base, tmp_path / "adapter").passed


SHAPES = {
    "llama": {
        "rank_pattern": (("mlp.up_proj", 2), (r".*\.1\.self_attn\.[qk]_proj", 7)),
        "alpha_pattern": (("q_proj", 3.0), ("layers.0.mlp.down_proj", 20.0)),
    },
    "gpt2": {"rank_pattern": (("attn.c_proj", 2), ("h.1.mlp.c_fc", 6)), "alpha_pattern": (("c_fc", 5.0),)},
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"layers_to_transform": (1,)}, {"use_rslora": True}])
def test_rank_and_alpha_patterns_and_layers_are_served_as_trained(load, tmp_path, family, more):
    base = load(family)
    shape = SHAPES[family] if "layers_to_transform" not in more else {"rank_pattern": (("c_fc|up_proj", 2),)}
    job = replace(JOB.config, lora=replace(JOB.config.lora, **shape, **more))
    trained(base, replace(JOB, config=job)).export("job", tmp_path / "adapter", base_name="tiny")

    verdict = verify_export(base, tmp_path / "adapter")

    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert verdict.passed, verdict
    assert verdict.max_abs_effect > 3 * verdict.tolerance
    assert content["layers_to_transform"] == ([1] if "layers_to_transform" in more else None)
    assert len(content["rank_pattern"]) == (1 if "layers_to_transform" in more else {"llama": 3, "gpt2": 3}[family])


def high_rate(learning_rate: float, seed: int) -> Submission:
    """Return a job that memorizes eight rows at a learning rate far above the usual."""
    job = config(rank=16, num_steps=100, batch_size=4, learning_rate=learning_rate, seed=seed)
    return Submission(config=job, train=dataset(seed, [20, 33, 15, 40, 25, 31, 18, 22]))


@pytest.mark.slow_repetitions
@pytest.mark.parametrize(
    ("family", "learning_rate", "seed"), [("llama", 0.05, 5), ("llama", 0.05, 8), ("gpt2", 0.05, 2)]
)
def test_bf16_adapters_of_a_high_rate_pass_and_damaged_ones_fail(load, tmp_path, family, learning_rate, seed):
    base = load(family, "bfloat16")
    directory = tmp_path / "adapter"
    trained(base, high_rate(learning_rate, seed)).export("job", directory, base_name="tiny")
    tensors = load_file(directory / "adapter_model.safetensors")

    verdict = verify_export(base, directory)

    assert verdict.passed, verdict
    assert verdict.worst_linear_error < 0.5
    for change in CHANGES:
        save_file(damaged(tensors, change), directory / "adapter_model.safetensors")
        assert not verify_export(base, directory).passed, change


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("dora", [False, True])
def test_each_matrix_off_by_a_tenth_is_detected_and_named(load, tmp_path, dora):
    base = load("llama", "bfloat16")
    directory = tmp_path / "adapter"
    job = JOB.config if not dora else replace(JOB.config, lora=replace(JOB.config.lora, use_dora=True))
    trained(base, replace(JOB, config=job)).export("job", directory, base_name="tiny")
    tensors = load_file(directory / "adapter_model.safetensors")
    for name in list(tensors)[::3]:
        save_file(tensors | {name: tensors[name] * 0.9}, directory / "adapter_model.safetensors")

        verdict = verify_export(base, directory)

        assert not verdict.passed
        assert f".{verdict.worst_linear}.lora_" in name
        assert verdict.worst_linear in verdict.explanation


def test_adapter_without_evidence_of_its_linears_is_rejected(exported):
    base, directory = exported
    probe = load_file(directory / "probe.safetensors")
    save_file({name: tensor for name, tensor in probe.items() if "." not in name}, directory / "probe.safetensors")

    with pytest.raises(BadAdapter, match="adapts other layers"):
        verify_export(base, directory)


CHANGES = {"scale": 0.5, "one matrix": -1, "zero": 0}
NOT_FINITE = {"overflow": 1e38, "infinity": float("inf"), "not a number": float("nan")}


def damaged(tensors: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    """Return a copy with every B, or one, multiplied by a factor."""
    wrong = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in wrong.items():
        if "lora_B" in name and (change != "one matrix" or "layers.1.mlp.down" in name or "h.1.mlp.c_proj" in name):
            tensor.mul_({**CHANGES, **NOT_FINITE}[change])
    return wrong


@pytest.mark.parametrize("change", ["scale", "one matrix", "zero"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_that_is_not_the_trained_one_fails_verification(load, tmp_path, dtype, change):
    base = load("llama", dtype)
    trained(base).export("job", tmp_path / "adapter", base_name="tiny")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(damaged(tensors, change), tmp_path / "adapter" / "adapter_model.safetensors")

    assert not verify_export(base, tmp_path / "adapter").passed


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("change", ["zero", *NOT_FINITE])
def test_report_on_a_damaged_adapter_is_json_without_infinity(exported, change):
    base, directory = exported
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file(damaged(tensors, change), directory / "adapter_model.safetensors")

    verdict = verify_export(base, directory)

    assert not verdict.passed
    assert json.loads(json.dumps(asdict(verdict), allow_nan=False)) == asdict(verdict)
    assert not re.search(r"\b(inf|nan)\b", verdict.explanation)
    assert verdict.worst_linear_error > 1


def test_rounding_that_is_not_finite_gives_no_tolerance(exported, monkeypatch):
    base, directory = exported
    shape = load_file(directory / "probe.safetensors")["logits"].shape
    monkeypatch.setattr("lora_core.peft_format.verify._nudged_logits", lambda *_, **__: torch.full(shape, float("inf")))

    verdict = verify_export(base, directory)

    assert not verdict.passed
    assert "not finite" in verdict.explanation


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_verification_leaves_the_loaded_base_unchanged_and_usable(load, tmp_path, family):
    base = load(family)
    engine = trained(base)
    engine.export("job", tmp_path / "adapter", base_name="tiny")
    before = snapshot(base)

    verify_export(base, tmp_path / "adapter")

    assert snapshot(base) == before
    engine.export("job", tmp_path / "again", base_name="tiny")
    for name in ("adapter_model.safetensors", "probe.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_export_and_verification_report_progress_at_each_linear(load, tmp_path, family):
    base = load(family)
    engine = trained(base)
    before = snapshot(base)
    calls: dict[str, int] = {"export": 0, "verification": 0}

    def count(part: str) -> None:
        calls[part] += 1

    engine.export("job", tmp_path / "adapter", base_name="tiny", between=lambda: count("export"))
    verify_export(base, tmp_path / "adapter", between=lambda: count("verification"))

    num_linears = len(base.linear_names())
    assert calls["export"] == 2 * num_linears  # with the adapter, and without
    assert calls["verification"] == 7 * num_linears  # six passes, and each linear separately
    assert snapshot(base) == before


def test_a_process_without_an_engine_can_verify(exported, load):
    assert verify_export(load("llama"), exported[1]).passed


def test_exported_weights_are_those_that_training_computed_with(load, tmp_path):
    base = load("llama", "bfloat16")
    engine = trained(base)
    engine.export("job", tmp_path / "adapter", base_name="tiny")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    flat = torch.cat([tensor.flatten() for tensor in ordered(tensors, engine)])
    assert torch.equal(flat, weights(engine, "job").bfloat16())


def ordered(tensors, engine):
    names = [target.name for target in engine._jobs["job"].adapter.targets]
    return [tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB" for name in names]


def test_configuration_is_minimal_and_has_the_fields_that_servers_expect(exported):
    content = json.loads((exported[1] / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "tiny/llama"
    assert (content["r"], content["lora_alpha"], content["peft_type"]) == (4, 8, "LORA")
    assert content["target_modules"] == sorted(content["target_modules"])
    assert set(content["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_a_base_model_on_the_hub_is_named_with_its_revision(load, tmp_path):
    engine = trained(load("llama"), JOB)
    for name, revision in (("hub", "12fd25f"), ("local", None)):
        engine.export("job", tmp_path / name, base_name="org/model", base_revision=revision)

    configs = [PeftConfig.from_pretrained(str(tmp_path / name)) for name in ("hub", "local")]
    assert [(each.base_model_name_or_path, each.revision) for each in configs] == [
        ("org/model", "12fd25f"), ("org/model", None),
    ]  # fmt: skip


def test_targets_without_a_common_short_name_are_written_in_full(load, tmp_path):
    job = replace(JOB, config=config(targets="layers.1.self_attn.q_proj"))
    trained(load("llama"), job).export("job", tmp_path / "adapter", base_name="tiny")
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_files_have_the_read_permissions_of_their_folder(exported):
    _, folder = exported

    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}

    assert set(modes.values()) == {folder.stat().st_mode & 0o666}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "probe.safetensors"])
def test_missing_or_damaged_files_are_rejected(exported, name):
    base, directory = exported
    (directory / name).write_bytes(b"\x80\x04 something else")
    with pytest.raises(BadAdapter):
        verify_export(base, directory)
    (directory / name).unlink()
    with pytest.raises(BadAdapter, match="missing"):
        verify_export(base, directory)


def test_adapter_that_requests_foreign_code_is_rejected(exported):
    base, directory = exported
    content = json.loads((directory / "adapter_config.json").read_text())
    content["auto_mapping"] = {"parent_library": "evil", "base_model_class": "Model"}
    (directory / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(BadAdapter, match="plain LoRA"):
        verify_export(base, directory)


def test_adapter_of_another_base_model_is_rejected(exported, load):
    with pytest.raises(BadAdapter):
        verify_export(load("gpt2"), exported[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_base_model_of_the_same_shape_fails_verification(load, tmp_path, dtype):
    base = load("llama", dtype)
    trained(base).export("job", tmp_path / "adapter", base_name="tiny")
    other = load("llama", dtype)
    for parameter in other.model.parameters():
        parameter.data = parameter.data + 0.02 * torch.sin(torch.arange(parameter.numel())).view(parameter.shape)

    assert verify_export(base, tmp_path / "adapter").passed
    assert not verify_export(other, tmp_path / "adapter").passed


def test_adapter_with_only_zero_logits_fails_with_an_explanation(exported, monkeypatch):
    base, folder = exported
    load_probe, last_logits = verify._load_probe, verify._last_logits

    def zeroed(*arguments):
        probe = load_probe(*arguments)
        return probe | {"logits": torch.zeros_like(probe["logits"])}

    monkeypatch.setattr(verify, "_load_probe", zeroed)
    monkeypatch.setattr(verify, "_last_logits", lambda *arguments: torch.zeros_like(last_logits(*arguments)))

    report = verify_export(base, folder)

    assert not report.passed
    assert "Every logit is zero" in report.explanation


def test_base_is_restored_if_peft_fails_midway(exported, monkeypatch):
    base, folder = exported
    before, load = snapshot(base), verify.PeftModel.from_pretrained

    def failing(*arguments, **options):
        load(*arguments, **options)
        raise ZeroDivisionError

    monkeypatch.setattr(verify.PeftModel, "from_pretrained", failing)
    with pytest.raises(ZeroDivisionError):
        verify_export(base, folder)

    assert snapshot(base) == before
    monkeypatch.undo()
    assert verify_export(base, folder).passed


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory."), OutOfMemory),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), torch.AcceleratorError),
        (RuntimeError("Error(s) in loading state_dict: size mismatch"), BadAdapter),
    ],
)
def test_device_errors_while_peft_loads_are_not_attributed_to_the_adapter(exported, monkeypatch, error, expected):
    base, folder = exported

    def failing(*_arguments, **_options):
        raise error

    monkeypatch.setattr(verify.PeftModel, "from_pretrained", failing)

    with pytest.raises(expected):
        verify_export(base, folder)


def test_logits_are_compared_on_the_cpu_for_any_device(exported):
    base, folder = exported

    probe = verify._load_probe(replace(base, device="meta"), folder)

    assert {tensor.device.type for tensor in probe.values()} == {"cpu"}


def test_evidence_for_other_linears_than_peft_adapts_is_rejected(exported):
    base, directory = exported
    probe = load_file(directory / "probe.safetensors")
    del probe["added.model.layers.0.mlp.up_proj"]
    save_file(probe, directory / "probe.safetensors")

    with pytest.raises(BadAdapter, match="other layers than training did"):
        verify_export(base, directory)
