"""`python -m tests.lora_core.train_in_ranks BASE OUT STRATEGY JOBS`: one of several processes that train jobs together.

JOBS selects jobs of all kinds ("kinds"), or a few on a real model. Each process writes OUT/RANK.json: the outcome of
every job, and PEFT's verdict on an adapter.
"""

import inspect
import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from lora_core.base_model.blocks import find_blocks
from lora_core.base_model.model import BaseModel, load_base
from lora_core.base_model.sharding import Strategy
from lora_core.distributed import ranks as distributed
from lora_core.distributed.ranks import Ranks
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import LoraCoreError
from lora_core.events import JobEvaluated, JobStepped
from lora_core.forward.generation import Prompts
from lora_core.peft_format.verify import verify_export
from lora_core.runtime import cpu_lanes as lanes_module
from tests.lora_core.scenarios import Outcome, Submission, admit, config, dataset, run_elastically, submissions
from tests.lora_core.test_laws_on_a_real_model import mixed_jobs

TOKEN_BUDGET = 120
"""Token budget of a rank. No tick holds all slices of the widest steps."""


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return the digest of weights and optimizer state, the repr of all events (exact floats), and their losses."""
    return {
        "vectors": sha256(outcome.vectors).hexdigest(),
        "events": [repr(event) for event in outcome.events],
        "losses": [event.loss for event in outcome.events if isinstance(event, (JobStepped, JobEvaluated))],
    }


def jobs_called(name: str, *, is_sharded: bool) -> dict[str, Submission]:
    """Return the jobs of a set. On a sharded base, omit those that read base weights directly."""
    jobs = submissions("llama") if name == "kinds" else mixed_jobs()
    return {
        name: job
        for name, job in jobs.items()
        if not is_sharded or not (job.config.lora.use_dora or job.config.lora.subtracts_start)
    }


def main(base_dir: Path, out: Path, strategy: Strategy, jobs_name: str) -> None:
    torch.set_num_threads(1)
    lanes_module.MIN_LANE_TOKENS = 8
    distributed.CARRIED_NUMBERS = 1000  # so that a sum travels between ranks in several pieces
    ranks = distributed.join("cpu", silence_seconds=120)
    base = load_base(base_dir, dtype="float32", device="cpu", strategy=strategy, ranks=ranks)
    jobs = jobs_called(jobs_name, is_sharded=base.is_sharded)
    found: dict[str, Any] = {"outcomes": {}, "is_offloaded": is_offloaded(base)}
    for name, options in {"by_lanes": {"num_lanes": 2, "job_tokens": 80}, "bound": {"num_lanes": 1}}.items():
        ended = run_elastically(base, jobs, token_budget=TOKEN_BUDGET, seed=3, victim="plain", ranks=ranks, **options)
        found["outcomes"][name] = {job: summary(outcome) for job, outcome in ended.items()}
    found |= exported(base, ranks, out / f"adapter-{ranks.rank}")
    found |= refused(base, ranks) | {"num_ticks": ticks_of_two_small_jobs(base, ranks)}
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))
    distributed.end_process()


def is_offloaded(base: BaseModel) -> bool:
    """Return the offload setting of the sharding library. On a CPU, offloaded shards are in the same memory."""
    block: Any = find_blocks(base.model).modules[0]
    if base.strategy == "replicated":
        return False
    if base.strategy.startswith("fsdp2"):
        (group,) = block._get_fsdp_state()._fsdp_param_groups
        return isinstance(group.offload_policy, CPUOffloadPolicy)
    sharded_by = inspect.getclosurevars(next(block.parameters()).all_gather).nonlocals["self"]
    return sharded_by.remote_device == "cpu"


def exported(base: BaseModel, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Return the digest of one job's adapter, PEFT's verdict, and an answer."""
    engine = Engine(base, EngineConfig(), ranks)
    admit(engine, "job", submissions("llama")["plain"])
    while not engine.idle:
        engine.tick()
    report = engine.export("job", folder, base_name="tiny")
    generation = engine.generation({"job": Prompts(prompts=((3, 5, 8),), max_tokens=6)})
    while not generation.is_complete:
        generation.advance()
    again = Engine(base, EngineConfig(checkpoint_blocks="always"), ranks)
    admit(again, "job", submissions("llama")["plain"])
    while not again.idle:
        again.tick()
    return {
        "adapter": report.sha256,
        "with_recomputed_blocks": again.export(
            "job", folder.with_name(f"{folder.name}-again"), base_name="tiny"
        ).sha256,
        "verified": verify_export(base, folder).passed,
        "base_bytes": engine.memory()["base_bytes"],
        "answers": repr(generation.answers()),
    }


def ticks_of_two_small_jobs(base: BaseModel, ranks: Ranks) -> int:
    """Return the number of ticks of two jobs with six one-slice steps. The first ticks compute a job alone."""
    engine = Engine(base, EngineConfig(ticks_alone=2), ranks)
    for name in ("one", "other"):
        engine.admit(name, config(num_steps=6, batch_size=1), dataset(1, [20, 20, 20]))
    num_ticks = 0
    while not engine.idle:
        engine.tick()
        num_ticks += 1
    return num_ticks


def refused(base: BaseModel, ranks: Ranks) -> dict[str, Any]:
    """Return the error that every rank raises for a job that only one of them can't admit."""
    engine = Engine(base, EngineConfig(), ranks)
    job = submissions("llama")["plain"]
    resume = Path("/nowhere") if ranks.rank == 1 else None
    try:
        admit(engine, "job", job, resume_from=resume)
    except LoraCoreError as error:
        return {"refused": error.code, "jobs": list(engine.jobs())}
    return {"refused": None, "jobs": list(engine.jobs())}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), cast(Strategy, sys.argv[3]), sys.argv[4])
