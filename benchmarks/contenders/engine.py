"""The engine as a contender: with one job, a pack, several jobs per host, and under the profiler."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gate import Gate, Json
from benchmarks.memory import memory, proportional_bytes
from benchmarks.step_profile import profile_of
from benchmarks.workload import LEARNING_RATE, SEED
from catalog.resources.memory import SLICE_TOKENS
from lora_core.base_model.model import load_base
from lora_core.config import JobConfig, LoraConfig, OptimizerConfig, ScheduleConfig
from lora_core.data.token_dataset import TokenDataset
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event, JobStepped
from worker.children.trainer.job_config import engine_config

ENDLESS = 10_000
"""Steps of a job that is stopped from outside."""


def lorry(gate: Gate, options: Json) -> None:
    """The engine with one job and the settings of the service. A step may take several ticks."""
    config = engine_config({"device": "cpu", "batch_invariant": True}, num_threads=options["threads"])
    engine = Engine(load_base(Path(options["base"]), dtype=options["dtype"], device="cpu"), config)
    job = job_config({"slice_tokens": SLICE_TOKENS["cpu"]} | options)
    engine.admit("job", job, TokenDataset.load(Path(options["tokens"])))
    _report_steps(gate, engine)


def _report_steps(gate: Gate, engine: Engine) -> None:
    while True:
        gate.wait()
        stepped = next(event for event in iter_events(engine) if isinstance(event, JobStepped))
        gate.report(tokens=stepped.num_tokens, labels=stepped.num_supervised_tokens, loss=stepped.loss)


def pack(gate: Gate, options: Json) -> None:
    """The engine with the number of jobs in each request. One tick runs a step of each job."""
    config = EngineConfig(token_budget=1 << 20, max_tick_seconds=3600, num_lanes=options["lanes"])
    engine = Engine(load_base(Path(options["base"]), dtype=options["dtype"], device="cpu"), config)
    rows = TokenDataset.load(Path(options["tokens"]))
    while True:
        wanted = gate.wait()["jobs"]
        for index in range(wanted, len(engine.jobs())):
            engine.evict(str(index))
        for index in range(len(engine.jobs()), wanted):
            engine.admit(str(index), job_config(options, seed=index), rows)
        gate.restart()
        events = [event for event in engine.tick() if isinstance(event, JobStepped)]
        assert len(events) == wanted, "one slice per job, all in one tick"
        gate.report(tokens=sum(event.num_tokens for event in events), bytes=memory("VmRSS"))


def several(gate: Gate, options: Json) -> None:
    """The engine with several jobs and the service's token budget per lane. A turn lasts until each has made a step."""
    lanes = options["lanes"]
    config = EngineConfig(token_budget=1024 * lanes, max_tick_seconds=1.0, num_lanes=lanes)
    engine = Engine(load_base(Path(options["base"]), dtype=options["dtype"], device="cpu"), config)
    rows = TokenDataset.load(Path(options["tokens"]))
    for index in range(options["jobs"]):
        engine.admit(str(index), job_config(options, seed=index), rows)
    while True:
        gate.wait()
        due, num_tokens = set(engine.jobs()), 0
        while due:
            for event in engine.tick():
                if isinstance(event, JobStepped):
                    due.discard(event.job)
                    num_tokens += event.num_tokens
        gate.report(tokens=num_tokens, bytes=proportional_bytes())


def profiled(gate: Gate, options: Json) -> None:
    """One step under torch's profiler after a plain one. Reports the seconds of each part, and of both steps."""
    engine = Engine(load_base(Path(options["base"]), dtype=options["dtype"], device="cpu"), EngineConfig())
    engine.admit("job", job_config(options), TokenDataset.load(Path(options["tokens"])))
    events = iter_events(engine)

    def step() -> JobStepped:
        return next(event for event in events if isinstance(event, JobStepped))

    step()
    gc.disable()
    while True:
        gate.wait()
        plain = step()
        plain_seconds = gate.seconds()
        parts, profiled_seconds, event = profile_of(engine.base, step)
        gate.report(
            parts=parts,
            profiled_seconds=profiled_seconds,
            plain_seconds_per_token=plain_seconds / plain.num_tokens,
            tokens=event.num_tokens,
            labels=event.num_supervised_tokens,
        )


def matrix(gate: Gate, options: Json) -> None:
    """The frozen matmuls alone, with the sizes of a step: the upper limit of this machine."""
    base = load_base(Path(options["base"]), dtype=options["dtype"], device="cpu")
    weights = [module.weight for module in base.model.modules() if isinstance(module, torch.nn.Linear)][:-1]
    num_tokens, flops = options["num_tokens"], 4 * options["num_tokens"] * sum(weight.numel() for weight in weights)
    inputs = {size: torch.randn(num_tokens, size).to(base.dtype) for weight in weights for size in weight.shape}
    while True:
        gate.wait()
        for weight in weights:
            torch.matmul(inputs[weight.shape[1]], weight.T)
            torch.matmul(inputs[weight.shape[0]], weight)
        gate.report(flops=flops, parameters=base.model.num_parameters())


def job_config(options: Json, *, seed: int = SEED) -> JobConfig:
    return JobConfig(
        lora=LoraConfig(rank=options["rank"], alpha=2 * options["rank"]),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        schedule=ScheduleConfig(kind="constant", num_steps=ENDLESS),
        batch_size=options["batch_size"],
        num_steps=ENDLESS,
        seed=seed,
        slice_tokens=options.get("slice_tokens", 1024),
    )


def iter_events(engine: Engine) -> Iterator[Event]:
    while True:
        yield from engine.tick()
