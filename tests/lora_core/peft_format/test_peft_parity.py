"""PEFT with a plain torch loop is the reference: same initialization, same order, same losses, same adapter."""

import warnings
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from lora_core.adapter.optimizer import learning_rate_at
from lora_core.config import JobConfig, ScheduleConfig
from lora_core.data.token_dataset import TokenDataset, rows_of_step
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import JobStepped
from tests.lora_core.scenarios import Submission, admit, config, dataset

CONFIG = config(rank=4, batch_size=3, num_steps=6, seed=7, slice_tokens=30)
JOB = Submission(
    # At the usual eps, a gradient that is only rounding gives as large an update as others, and CPUs round differently.
    config=replace(CONFIG, optimizer=replace(CONFIG.optimizer, eps=1e-5)),
    train=dataset(7, [12, 25, 9, 31, 17, 6, 20]),
)
LONG = replace(JOB.config, num_steps=50, schedule=ScheduleConfig(kind="cosine", warmup_steps=3, num_steps=50))
PATTERNS = {"llama": (("q_proj", 2), (r".*\.1\.mlp\.\w+", 6)), "gpt2": (("c_fc", 2), (r"h\.1\.attn\.\w+", 6))}


def methods(family: str) -> dict[str, JobConfig]:
    """Return jobs at learning rates without chaotic training, where a difference in the last bits doesn't grow."""
    calm = replace(LONG, optimizer=replace(LONG.optimizer, learning_rate=1e-3))
    return {
        "lora": calm,
        "rslora": replace(calm, lora=replace(calm.lora, use_rslora=True)),
        "lora_plus": replace(calm, optimizer=replace(calm.optimizer, learning_rate=5e-4, lora_plus_ratio=8.0)),
        "dora": replace(calm, lora=replace(calm.lora, use_dora=True)),
        "patterns": replace(calm, lora=replace(calm.lora, rank_pattern=PATTERNS[family])),
    }


def reference_run(
    model, adapter_dir, job: JobConfig, train: TokenDataset = JOB.train
) -> tuple[list[float], dict[str, torch.Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(model, adapter_dir, is_trainable=True)
    return run_reference(model, job, train)


def run_reference(
    model, job: JobConfig, train: TokenDataset = JOB.train
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train the parameters of a PEFT model that require a gradient. Return the losses and the adapter."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter for name, parameter in trained.items() if "lora_A" in name]},
            {"params": [parameter for name, parameter in trained.items() if "lora_A" not in name]},
        ],
        eps=job.optimizer.eps,
        weight_decay=job.optimizer.weight_decay,
    )
    losses = [reference_step(model, optimizer, step, job, train) for step in range(job.num_steps)]
    return losses, get_peft_model_state_dict(model, save_embedding_layers=False)


def reference_step(model, optimizer, step: int, job: JobConfig, train: TokenDataset) -> float:
    rows = rows_of_step(num_rows=train.num_rows, batch_size=job.batch_size, seed=job.seed, step=step)
    num_labels = sum(int(train.row(row)[1].sum()) for row in rows)
    total = 0.0
    for row in rows:
        ids, mask = (torch.from_numpy(part.astype("int64")) for part in train.row(row))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        labels = torch.where(mask[1:] == 1, ids[1:], -100)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_labels
        loss.backward()
        total += loss.item()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
    rate = learning_rate_at(step + 1, peak=job.optimizer.learning_rate, schedule=job.schedule)
    for group, factor in zip(optimizer.param_groups, (1.0, job.optimizer.lora_plus_ratio), strict=True):
        group["lr"] = rate * factor
    optimizer.step()
    optimizer.zero_grad()
    return total


def assert_equal_to_peft(load, family: str, job: JobConfig, folder, train: TokenDataset = JOB.train) -> None:
    engine = Engine(load(family), EngineConfig())
    admit(engine, "job", Submission(config=job, train=train))
    engine.export("job", folder / "start", base_name="tiny")
    losses = []
    while not engine.idle:
        losses += [event.loss for event in engine.tick() if isinstance(event, JobStepped)]
    engine.export("job", folder / "end", base_name="tiny")

    expected_losses, expected = reference_run(load(family).model, folder / "start", job, train)

    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.05
    trained = load_file(folder / "end" / "adapter_model.safetensors")
    assert len(trained) == len(expected)
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_and_adapter_equal_peft_with_a_plain_loop(load, tmp_path, family):
    assert_equal_to_peft(load, family, JOB.config, tmp_path)


@pytest.mark.parametrize("method", ["lora", "rslora", "lora_plus", "dora", "patterns"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fifty_steps_of_each_method_equal_peft(load, tmp_path, family, method):
    assert_equal_to_peft(load, family, methods(family)[method], tmp_path)
