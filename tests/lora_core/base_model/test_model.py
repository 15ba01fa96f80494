"""A base model is described without weights, and loaded without copies."""

import json
import re
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.base_model import model
from lora_core.base_model.loading import load_with_transformers
from lora_core.base_model.model import describe_base, load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import ConfigError, DeviceUnusable, UnreachableSource
from lora_core.events import JobEvaluated
from lora_core.peft_format.verify import verify_export
from tests.lora_core.scenarios import Submission, admit, config, text_dataset


def test_a_base_is_described_from_its_config_alone(base_dirs, tmp_path):
    (tmp_path / "config.json").write_bytes((base_dirs["llama"] / "config.json").read_bytes())
    description = describe_base(tmp_path)
    assert json.loads(json.dumps(description)) == description
    assert description["architecture"] == "LlamaForCausalLM"
    assert (description["num_layers"], description["hidden_size"], description["vocab_size"]) == (2, 64, 320)
    assert description["max_positions"] == 256
    assert description["linear_shapes"]["k_proj"] == [[32, 64], 2]
    assert description["linear_shapes"]["down_proj"] == [[64, 128], 2]
    assert "lm_head" not in description["linear_shapes"]
    block = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64  # q k v o, feed-forward, two norms
    assert description["blocks"] == {"count": 2, "num_parameters": 2 * block, "largest_parameters": block}
    loaded = load_base(base_dirs["llama"], dtype="float32", device="cpu")
    assert description["num_parameters"] == loaded.model.num_parameters()


def test_weights_under_outdated_names_are_freed_before_they_are_loaded_again(base_dirs, tmp_path, monkeypatch):
    shutil.copytree(base_dirs["gpt2"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    save_file(
        {name.removeprefix("transformer."): weight for name, weight in load_file(path).items()},
        path,
        metadata={"format": "pt"},
    )
    read: list[weakref.ref] = []

    def loaded(path):
        weights = load_file(path)
        read.extend(weakref.ref(weight) for weight in weights.values())
        return weights

    def again(*args, **options):
        assert read
        assert [weight() for weight in read if weight() is not None] == []
        return load_with_transformers(*args, **options)

    monkeypatch.setattr(model, "load_file", loaded)
    monkeypatch.setattr(model, "load_with_transformers", again)

    found = load_base(tmp_path, dtype="float32", device="cpu").model.state_dict()

    expected = load_base(base_dirs["gpt2"], dtype="float32", device="cpu").model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def test_paths_of_linears_are_listed_once_for_all_blocks(base_dirs):
    assert describe_base(base_dirs["llama"])["linear_paths"][0] == {
        "path": "model.layers.*.self_attn.q_proj",
        "shape": [64, 64],
        "layers": [0, 1],
    }


def test_conv1d_shapes_are_reported_as_out_and_in_features(base_dirs):
    assert describe_base(base_dirs["gpt2"])["linear_shapes"]["c_attn"] == [[192, 64], 2]


@pytest.mark.parametrize(("name", "value"), [("dtype", "float16"), ("quantization", "int4"), ("task", "SEQ_CLS")])
def test_unknown_dtype_quantization_or_task_is_rejected(base_dirs, name, value):
    given = {"dtype": "float32", name: value}
    with pytest.raises(ConfigError, match=f"{name} is '{value}'") as refusal:
        load_base(base_dirs["llama"], device="cpu", **given)
    assert "Use one of: " in refusal.value.remedy


def test_folder_can_be_a_string_and_must_exist(base_dirs, tmp_path):
    assert load_base(str(base_dirs["llama"]), dtype="float32", device="cpu").vocab_size == 320
    for path, reason in ((tmp_path / "none", "does not exist"), (base_dirs["llama"] / "config.json", "is a file")):
        with pytest.raises(UnreachableSource, match=reason):
            load_base(path, dtype="float32", device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loaded_base_is_frozen_tied_and_equal_to_transformers(base_dirs, family, dtype):
    from transformers import AutoModelForCausalLM

    base = load_base(base_dirs[family], dtype=dtype, device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(base_dirs[family], dtype=dtype)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, reference.forward(input_ids=ids).logits)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.num_bytes == sum(parameter.nbytes for parameter in reference.parameters())


def test_weights_are_memory_mapped_and_never_written_to(base_dirs):
    content = (base_dirs["llama"] / "model.safetensors").read_bytes()
    base = load_base(base_dirs["llama"], dtype="float32", device="cpu")
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    assert mapped
    for weight in base.model.parameters():
        weight.data.add_(1)
    assert (base_dirs["llama"] / "model.safetensors").read_bytes() == content


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_real_gguf_is_imported_trained_and_served(real_base_dir, tmp_path):
    description = describe_base(real_base_dir)
    base = load_base(real_base_dir, dtype="bfloat16", device="cpu")
    engine = Engine(base, EngineConfig())
    data = text_dataset(real_base_dir)
    job = config(rank=8, num_steps=6, learning_rate=1e-3, batch_size=3)
    admit(engine, "job", Submission(config=job, train=data, valid=data))
    admit(engine, "mate", Submission(config=job, train=data))
    losses = []
    while not engine.idle:
        losses += [event.loss for event in engine.tick() if isinstance(event, JobEvaluated)]
    engine.export("job", tmp_path / "adapter", base_name="real")

    assert description["dtype"] == "bfloat16"
    assert (real_base_dir / "chat_template.jinja").is_file()
    assert losses[0] < 7  # a language model, not noise: noise would give log(vocabulary), above 10
    assert losses[1] < losses[0] - 0.5
    assert verify_export(base, tmp_path / "adapter").passed


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads the memory maps of the Linux kernel")
def test_plain_base_uses_the_pages_of_its_file_without_copies(base_dirs):
    """No mapped weight is a copy. All weights are pages of the file, which the kernel can share or drop."""
    path = base_dirs["llama"] / "model.safetensors"
    other, base = (load_base(base_dirs["llama"], dtype="float32", device="cpu") for _ in range(2))
    assert all(parameter.isfinite().all() for parameter in base.model.parameters())  # every page has been read

    addresses = [parameter.data_ptr() for parameter in base.model.parameters()]
    mapped = mapping_around(addresses[0], path)

    assert all(mapped.start <= address < mapped.stop for address in addresses)
    assert mapped.copied_bytes == 0

    next(base.model.parameters()).data.flatten()[0] += 1
    assert mapping_around(addresses[0], path).copied_bytes > 0  # a write is detected
    assert mapping_around(next(other.model.parameters()).data_ptr(), path).copied_bytes == 0


@dataclass(frozen=True, kw_only=True)
class Mapping:
    start: int
    stop: int
    copied_bytes: int


def mapping_around(address: int, path: Path) -> Mapping:
    """Return the mapping of the file that contains the address, according to /proc/self/smaps."""
    found, inside = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = line.endswith(str(path.resolve()))
            if inside:
                found.append([int(header[1], 16), int(header[2], 16), 0])
        elif inside and line.startswith("Anonymous:"):
            found[-1][2] = int(line.split()[1]) * 1024
    (mapping,) = [Mapping(start=a, stop=b, copied_bytes=copied) for a, b, copied in found if a <= address < b]
    return mapping


TOO_OLD = "The NVIDIA driver on your system is too old (found version 12080). Update it.\nSee https://nvidia.com"


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled."),
        (RuntimeError(TOO_OLD), TOO_OLD.partition("\n")[0]),
        (None, "it finds no GPU."),
    ],
    ids=["build without CUDA", "old driver", "no GPU"],
)
def test_gpu_that_torch_can_not_use_is_rejected_with_the_reason(base_dirs, monkeypatch, raised, reason):
    def init() -> None:
        if raised is not None:
            raise raised

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)

    with pytest.raises(DeviceUnusable) as caught:
        load_base(base_dirs["llama"], dtype="float32", device="cuda:0")

    assert caught.value.message == f"PyTorch {torch.__version__} can't use cuda:0: {reason}"
    assert "nvidia-smi" in caught.value.remedy
