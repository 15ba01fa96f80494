"""The engine as a contender, and the matmul rate that limits it. A base model without weights gets random ones."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.contenders.baselines import is_random, plain_model
from benchmarks.gate import Gate, Json
from benchmarks.workload import LEARNING_RATE, SEED
from lora_core.base_model.model import BaseModel, load_base
from lora_core.config import JobConfig, LoraConfig, OptimizerConfig, ScheduleConfig
from lora_core.data.token_dataset import TokenDataset
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import JobDiverged, JobStepped

ENDLESS = 10_000
"""Steps of a job that is stopped from outside."""


def lorry(gate: Gate, options: Json) -> None:
    """The engine with the settings of the service and `jobs` jobs. A turn lasts until each job has made a step."""
    engine = engine_with_jobs(options)
    while True:
        gate.wait()
        gate.report(**step_of_all(engine))


def engine_with_jobs(options: Json) -> Engine:
    if "tick_tokens" not in options:
        options = options | _sizes_on_a_cpu(options["threads"])
    sizes = {name: options[name] for name in ("job_tokens", "job_slices", "num_lanes") if name in options}
    engine = Engine(base_model(options), EngineConfig(token_budget=options["tick_tokens"], **sizes))
    for number in range(options.get("jobs", 1)):
        engine.admit(str(number), job_config(options, seed=SEED + number), rows(options))
    return engine


def _sizes_on_a_cpu(num_lanes: int) -> Json:
    """Return the sizes of the service. The machine of the GPU kit lacks the packages that `catalog` needs."""
    from catalog.resources import memory

    return {
        "tick_tokens": memory.tick_tokens("cpu", num_lanes=num_lanes),
        "job_tokens": memory.MOST_JOB_TOKENS["cpu"],
        "job_slices": 1 + memory.FURTHER_SLICES,
        "slice_tokens": memory.SLICE_TOKENS["cpu"],
        "num_lanes": num_lanes,
    }


def step_of_all(engine: Engine) -> Json:
    """Run ticks until every job has made a step. Some jobs make two meanwhile, whose tokens count as well."""
    due, steps, num_ticks = set(engine.jobs()), list[JobStepped](), 0
    num_recomputed = engine.activations.num_checkpointed
    while due:
        for event in engine.tick():
            if isinstance(event, JobDiverged):
                raise RuntimeError(f"Job {event.job} diverged after step {event.step}: {event.message}")
            if isinstance(event, JobStepped):
                due.discard(event.job)
                steps.append(event)
        num_ticks += 1
    return {
        "tokens": sum(step.num_tokens for step in steps),
        "labels": sum(step.num_supervised_tokens for step in steps),
        "loss": steps[0].loss,
        "ticks": num_ticks,
        "recomputed_ticks": engine.activations.num_checkpointed - num_recomputed,
    }


def matrix(gate: Gate, options: Json) -> None:
    """The frozen matmuls alone, with the sizes of a step: the upper limit of this machine."""
    base = base_model(options)
    weights = [module.weight for module in base.model.modules() if isinstance(module, torch.nn.Linear)][:-1]
    num_tokens, flops = options["num_tokens"], 4 * options["num_tokens"] * sum(weight.numel() for weight in weights)
    sizes = {size for weight in weights for size in weight.shape}
    inputs = {size: torch.randn(num_tokens, size, device=base.device).to(base.dtype) for size in sizes}
    while True:
        gate.wait()
        for weight in weights:
            torch.matmul(inputs[weight.shape[1]], weight.T)
            torch.matmul(inputs[weight.shape[0]], weight)
        gate.report(flops=flops, parameters=base.model.num_parameters())


def base_model(options: Json) -> BaseModel:
    folder, device = Path(options["base"]), options.get("device", "cpu")
    if not is_random(folder):
        return load_base(folder, dtype=options["dtype"], device=device)
    model = plain_model(options).requires_grad_(False).eval()
    return BaseModel(model=model, dtype=model.dtype, device=device)


def job_config(options: Json, *, seed: int = SEED) -> JobConfig:
    return JobConfig(
        lora=LoraConfig(rank=options["rank"], alpha=2 * options["rank"]),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        schedule=ScheduleConfig(kind="constant", num_steps=ENDLESS),
        batch_size=options["batch_size"],
        num_steps=ENDLESS,
        seed=seed,
        slice_tokens=options["slice_tokens"],
    )


def rows(options: Json) -> TokenDataset:
    return TokenDataset.load(Path(options["tokens"]))
