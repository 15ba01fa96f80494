"""Common ways to train one adapter, as contenders."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gate import Gate, Json
from benchmarks.workload import LEARNING_RATE, batches
from lora_core.data.token_dataset import TokenDataset


def peft_loop(gate: Gate, options: Json) -> None:
    """PEFT in a plain loop, with adapters in the base model's dtype: the fastest way without a trainer class."""
    model = peft_model(options, in_base_dtype=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE)
    model.train()
    for batch in rows_in_order(options):
        padded = {name: part.to(model.device) for name, part in pad(batch).items()}
        gate.wait()
        loss = model(**padded).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gate.report(**counts(padded), loss=float(loss.detach()))


def peft_trainer(gate: Gate, options: Json) -> None:
    """PEFT with transformers' Trainer, both with defaults, as in PEFT's documentation."""
    from transformers import Trainer, TrainingArguments

    model = peft_model(options)
    counted = Counted(pad)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            **trainer_arguments(gate, folder, options),
            bf16=options.get("device", "cpu") != "cpu",  # as is usual on a GPU
            per_device_train_batch_size=options["batch_size"],
        )
        rows = [row for batch in rows_in_order(options) for row in batch]
        dataset: Any = rows
        trainer = Trainer(model, arguments, data_collator=counted, train_dataset=dataset)
        trainer.add_callback(at_gate(gate, counted))
        trainer.train()
        model.save_pretrained(folder)


def trl_sft(gate: Gate, options: Json) -> None:
    """TRL's SFTTrainer with packing to 1,024 tokens, without gradient checkpointing, which would cost time."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]

    rows = [row for batch in rows_in_order(options) for row in batch]
    dataset = Dataset.from_list([{name: row[name] for name in ("input_ids", "completion_mask")} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            **trainer_arguments(gate, folder, options),
            bf16=options["dtype"] == "bfloat16",
            per_device_train_batch_size=1,
            gradient_checkpointing=False,
            packing=True,
            max_length=1024,
            completion_only_loss=True,
        )
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options["base"])
        trainer = SFTTrainer(
            model=plain_model(options),
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config(options),
        )
        counted = Counted(trainer.data_collator)
        trainer.data_collator = counted
        trainer.add_callback(at_gate(gate, counted))
        trainer.train()


def plain_model(options: Json) -> Any:
    """Return a model of the folder, on the device. A folder that has only a config.json gives random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, dtype, device = options["base"], getattr(torch, options["dtype"]), options.get("device", "cpu")
    if not is_random(Path(folder)):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def is_random(folder: Path) -> bool:
    return not any(folder.glob("*.safetensors"))


def peft_config(options: Json) -> Any:
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        r=options["rank"], lora_alpha=2 * options["rank"], target_modules="all-linear", task_type="CAUSAL_LM"
    )


def peft_model(options: Json, *, in_base_dtype: bool = False) -> Any:
    """Return a PEFT model. PEFT's adapters are fp32 by default."""
    from peft import get_peft_model

    return get_peft_model(plain_model(options), peft_config(options), autocast_adapter_dtype=not in_base_dtype)


def rows_in_order(options: Json) -> list[list[dict[str, list[int]]]]:
    dataset = TokenDataset.load(Path(options["tokens"]))
    return batches(dataset, batch_size=options["batch_size"], num_steps=400)


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad to the longest row of the batch, on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

    return {
        "input_ids": filled([row["input_ids"] for row in rows], 0),
        "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": filled([row["labels"] for row in rows], -100),
    }


def counts(batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the number of tokens without padding, and of those that are trained on."""
    mask = batch.get("attention_mask")
    tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
    return {"tokens": tokens, "labels": int((batch["labels"] != -100).sum())}


class Counted:
    """A collator that records the counts of each batch. The trainer prefetches, so they are consumed in order."""

    def __init__(self, collate: Callable[..., Any]) -> None:
        self._collate = collate
        self.counts: deque[dict[str, int]] = deque()

    def __call__(self, rows: list[Any]) -> Any:
        batch = self._collate(rows)
        self.counts.append(counts(batch))
        return batch


def trainer_arguments(gate: Gate, folder: str, options: Json) -> Json:
    return {
        "output_dir": folder,
        "use_cpu": options.get("device", "cpu") == "cpu",
        "max_steps": gate.num_steps or 300,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def at_gate(gate: Gate, counted: Counted) -> Any:
    """Return a callback that waits before each step, and reports when the step's loss is logged."""
    from transformers import TrainerCallback

    class AtGate(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.wait()

        def on_log(self, *_: Any, logs: Json | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                gate.report(**counted.counts.popleft(), loss=float(logs["loss"]))

    return AtGate()
