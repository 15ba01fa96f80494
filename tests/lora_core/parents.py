"""Adapters to continue: trained here, or saved by PEFT with random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch

from lora_core.base_model.model import BaseModel
from lora_core.config import JobConfig, LoraConfig, ObjectiveConfig, OptimizerConfig, ScheduleConfig
from lora_core.engine.engine import Engine
from lora_core.peft_format.load_parent import lora_config_of
from tests.lora_core.exports import trained
from tests.lora_core.scenarios import Submission, config, dataset

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "patterns": {"use_rslora": True, "rank_pattern": ((r"1\.\w+\.\w+", 3),), "alpha_pattern": ((r".*\.0\..*", 3.0),)},
    "dora": {"use_dora": True},
    "in_full": {"modules_to_save": ("lm_head",)},
    "tokens": {"trainable_token_indices": (300, 2, 17, *range(100, 140))},
    "pissa": {"init_lora_weights": "pissa"},
    "olora_dora": {"init_lora_weights": "olora", "use_dora": True},
}


def parent_job(method: str, **options: Any) -> Submission:
    job = config(rank=4, num_steps=3, seed=51, learning_rate=3e-3, **options)
    return Submission(
        config=replace(job, lora=replace(job.lora, **METHODS[method])), train=dataset(51, [14, 31, 9, 22])
    )


def make_parent(base: BaseModel, folder: Path, method: str = "lora") -> Engine:
    """Train an adapter, export it into `folder` and return its engine."""
    engine = trained(base, parent_job(method))
    engine.export("job", folder, base_name="tiny")
    return engine


def child_of(parent: Path, *, seed: int = 60, dropout: float = 0.1, **options: Any) -> Submission:
    """Return a job that continues `parent`, with evaluations, several slices per step and other data."""
    job = config(
        **{
            "batch_size": 3,
            "num_steps": 3,
            "seed": seed,
            "evaluate_every_steps": 2,
            "slice_tokens": 40,
            "learning_rate": 3e-3,
            **options,
        }
    )
    return Submission(
        config=replace(job, lora=replace(lora_config_of(parent), dropout=dropout)),
        train=dataset(seed, [22, 35, 9, 14, 28, 6]),
        valid=dataset(seed + 1, [30, 17]),
        parent=parent,
    )


DPO = ObjectiveConfig(kind="dpo", beta=0.5)


def stateless(lora: LoraConfig, *, num_steps: int, batch_size: int = 2) -> JobConfig:
    """Return a job whose next step depends only on weights, learning rate and rows: SGD without momentum."""
    return JobConfig(
        lora=lora,
        optimizer=OptimizerConfig(kind="sgd", learning_rate=0.05, weight_decay=0.01, lora_plus_ratio=2.0),
        schedule=ScheduleConfig(kind="constant", num_steps=num_steps),
        batch_size=batch_size,
        num_steps=num_steps,
        seed=3,
        slice_tokens=30,
    )


def save_by_peft(model: torch.nn.Module, folder: Path, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """Save a PeftModel with random weights as PEFT does by default, and return it."""
    torch.manual_seed(4)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **fields))  # pyright: ignore[reportArgumentType]
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            change = 0.2 * torch.randn_like(parameter) * parameter.abs().mean().clamp(min=0.1)
            parameter.data = (parameter + change).to(dtype)
    adapted.save_pretrained(str(folder))
    return adapted.eval()
