"""PEFT with a plain torch loop is the reference: same start, same order, same losses, same adapter."""

import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lora_core.config import EngineConfig
from lora_core.data import rows_of_step
from lora_core.engine import Engine
from lora_core.events import JobStepped
from lora_core.optim import learning_rate_at
from tests.lora_core.scenarios import Submission, admit, config, dataset

JOB = Submission(
    config=config(rank=4, batch_size=3, num_steps=6, seed=7, slice_tokens=30),
    train=dataset(7, [12, 25, 9, 31, 17, 6, 20]),
)


def reference_run(model, adapter_dir) -> tuple[list[float], dict[str, torch.Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(model, adapter_dir, is_trainable=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=JOB.config.optimizer.weight_decay)
    losses = [reference_step(model, parameters, optimizer, step) for step in range(JOB.config.num_steps)]
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}


def reference_step(model, parameters, optimizer, step: int) -> float:
    rows = rows_of_step(num_rows=JOB.train.num_rows, batch_size=JOB.config.batch_size, seed=JOB.config.seed, step=step)
    num_labels = sum(int(JOB.train.row(row)[1].sum()) for row in rows)
    total = 0.0
    for row in rows:
        ids, mask = (torch.from_numpy(part.astype("int64")) for part in JOB.train.row(row))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        labels = torch.where(mask[1:] == 1, ids[1:], -100)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_labels
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
    peak, schedule = JOB.config.optimizer.learning_rate, JOB.config.schedule
    optimizer.param_groups[0]["lr"] = learning_rate_at(step + 1, peak=peak, schedule=schedule)
    optimizer.step()
    optimizer.zero_grad()
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_and_adapter_equal_those_of_peft_with_a_plain_loop(load, tmp_path, family):
    engine = Engine(load(family), EngineConfig())
    admit(engine, "job", JOB)
    engine.export("job", tmp_path / "start", base_name="tiny")
    losses = []
    while not engine.idle:
        losses += [event.loss for event in engine.tick() if isinstance(event, JobStepped)]
    engine.export("job", tmp_path / "end", base_name="tiny")

    expected_losses, expected = reference_run(load(family).model, tmp_path / "start")

    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.05
    trained = load_file(tmp_path / "end" / "adapter_model.safetensors")
    assert len(trained) == len(expected)
    for name, tensor in trained.items():
        reference = expected[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(tensor, reference, rtol=1e-4, atol=1e-4)
