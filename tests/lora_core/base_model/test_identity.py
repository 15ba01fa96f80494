"""A checkpoint identifies its base model by dtype, quantization, task and the digest of its weights and config."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.base_model.model import BaseModel, load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadCheckpoint
from tests.lora_core.scenarios import Submission, admit, config, dataset

JOB = Submission(config=config(num_steps=2), train=dataset(1, [10, 12, 8]))


def saved_on(base: BaseModel, folder: Path) -> Path:
    engine = Engine(base, EngineConfig())
    admit(engine, "job", JOB)
    engine.tick()
    engine.save_checkpoint("job", folder)
    return folder


def refusal_on(base: BaseModel, checkpoint: Path) -> BadCheckpoint:
    """Return the error of resuming the job on `base`, which doesn't admit it."""
    engine = Engine(base, EngineConfig())
    with pytest.raises(BadCheckpoint) as caught:
        admit(engine, "job", JOB, resume_from=checkpoint)
    assert engine.jobs() == ()
    return caught.value


def copied(base_dir: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base_dir, folder))


def changed(base_dir: Path, folder: Path, name: str, *, place: int) -> Path:
    """Copy the base with one changed value in one tensor."""
    copied(base_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[place] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def digest_of(folder: Path) -> str | None:
    return load_base(folder, dtype="float32", device="cpu").digest


def test_checkpoint_of_a_base_in_another_dtype_is_rejected(load, tmp_path):
    saved = saved_on(load("llama", "bfloat16"), tmp_path / "saved")

    error = refusal_on(load("llama", "float32"), saved)

    assert "with dtype 'bfloat16', but this base model has 'float32'" in error.message
    assert "Load the base model with dtype='bfloat16'" in error.remedy


@pytest.mark.parametrize(("before", "after"), [("none", "nf4"), ("int8", "nf4"), ("nf4", "none")])
def test_checkpoint_of_a_base_with_another_quantization_is_rejected(
    base_dirs, tmp_path, before: Literal["none", "int8", "nf4"], after: Literal["nf4", "none"]
):
    pytest.importorskip("bitsandbytes")
    first, second = (
        load_base(base_dirs["llama"], dtype="float32", device="cpu", quantization=kind) for kind in (before, after)
    )
    assert first.digest == second.digest

    error = refusal_on(second, saved_on(first, tmp_path / "saved"))

    assert f"with quantization '{before}', but this base model has '{after}'" in error.message
    assert f"quantization='{before}'" in error.remedy


def test_checkpoint_of_a_base_for_another_task_is_rejected(load, tmp_path):
    base = load("llama")
    saved = saved_on(base, tmp_path / "saved")
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"task": "sequence-classification"}))

    error = refusal_on(base, saved)

    assert "with task 'sequence-classification', but this base model has 'causal-lm'" in error.message


def test_checkpoint_of_another_model_of_the_same_shape_is_rejected(base_dirs, load, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    other = changed(base_dirs["llama"], tmp_path / "tuned", name, place=0)
    saved = saved_on(load("llama"), tmp_path / "saved")

    error = refusal_on(load_base(other, dtype="float32", device="cpu"), saved)

    assert "another base model" in error.message
    assert "Load the base model that the job started on" in error.remedy


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_checkpoint_of_another_model_is_rejected_on_a_quantized_base(base_dirs, tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    other = changed(base_dirs["llama"], tmp_path / "tuned", "model.norm.weight", place=0)
    first, second = (
        load_base(folder, dtype="bfloat16", device="cpu", quantization=kind) for folder in (base_dirs["llama"], other)
    )

    error = refusal_on(second, saved_on(first, tmp_path / "saved"))

    assert "another base model" in error.message


def test_checkpoint_resumes_after_the_base_folder_has_moved(base_dirs, load, tmp_path):
    saved = saved_on(load("llama"), tmp_path / "saved")
    moved = load_base(copied(base_dirs["llama"], tmp_path / "elsewhere"), dtype="float32", device="cpu")
    engine = Engine(moved, EngineConfig())

    admit(engine, "job", JOB, resume_from=saved)

    assert engine.progress("job") == (1, 2)


def test_digest_does_not_depend_on_the_process_or_the_split_into_files(base_dirs, tmp_path):
    folder = copied(base_dirs["llama"], tmp_path / "cut")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number in (0, 1):
        part = dict(list(tensors.items())[number::2])
        save_file(part, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
    code = (
        "import sys; from pathlib import Path; from lora_core.base_model.identity import base_digest; "
        "folder = Path(sys.argv[1]); print(base_digest(folder, list(folder.glob('*.safetensors'))))"
    )

    found = subprocess.run(
        [sys.executable, "-c", code, str(base_dirs["llama"])], capture_output=True, text=True, check=True
    )

    assert found.stdout.strip() == digest_of(base_dirs["llama"]) == digest_of(folder)


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_digest_changes_with_the_first_and_the_last_value_of_a_tensor(base_dirs, tmp_path, name, place):
    other = changed(base_dirs["llama"], tmp_path / "tuned", name, place=place)

    assert digest_of(other) != digest_of(base_dirs["llama"])


def test_digest_changes_with_the_config_and_not_with_its_layout(base_dirs, tmp_path):
    laid_out, rotated = copied(base_dirs["llama"], tmp_path / "a"), copied(base_dirs["llama"], tmp_path / "b")
    written = json.loads((laid_out / "config.json").read_text())
    (laid_out / "config.json").write_text(json.dumps(dict(reversed(written.items()))))
    rotation = {"rope_type": "default", "rope_theta": 5e5}
    (rotated / "config.json").write_text(json.dumps(written | {"rope_parameters": rotation}))

    digests = [digest_of(folder) for folder in (base_dirs["llama"], laid_out, rotated)]

    assert digests[0] == digests[1] != digests[2]


def test_digest_does_not_depend_on_the_library_that_wrote_the_config(base_dirs, tmp_path):
    folder = copied(base_dirs["llama"], tmp_path / "copy")
    found = json.loads((folder / "config.json").read_text())

    (folder / "config.json").write_text(json.dumps(found | {"transformers_version": "99.0", "_name_or_path": "there"}))

    assert digest_of(folder) == digest_of(base_dirs["llama"])


def test_digest_reads_a_bounded_part_of_a_large_tensor(tmp_path):
    from lora_core.base_model.identity import RUN_BYTES, RUNS, base_digest

    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    large = torch.zeros(64 * RUNS * RUN_BYTES, dtype=torch.uint8)
    digests = []
    for place in (None, RUN_BYTES, len(large) // 3, len(large) - 1):
        tensor = large.clone()
        if place is not None:
            tensor[place] = 1
        save_file({"weight": tensor}, path)
        digests.append(base_digest(tmp_path, [path]))

    assert digests[0] == digests[1], "the value lies between the positions that are read"
    assert len(set(digests)) == 3
