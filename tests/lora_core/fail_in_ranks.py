"""`python -m tests.lora_core.fail_in_ranks BASE OUT STRATEGY WAY`: one of two processes of which the second fails.

Each writes OUT/RANK.json: the outcome of jobs when only the second process ran out of memory, the messages about
differing weights and about a job that diverged on one rank or both, and how the process ended when the second failed
in that WAY. That failure comes last.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from lora_core.base_model.model import BaseModel, load_base
from lora_core.base_model.sharding import Strategy
from lora_core.distributed import ranks as distributed
from lora_core.distributed.failure_broadcast import broadcast_failures
from lora_core.distributed.ranks import ALONE, Ranks
from lora_core.engine import job as job_module
from lora_core.engine import step as passes
from lora_core.engine.engine import Engine
from lora_core.engine.step import TickPlan
from lora_core.engine_config import EngineConfig
from lora_core.errors import OutOfMemory, RanksDiffer
from lora_core.events import JobDiverged
from lora_core.forward import continuous_batch, language_model
from lora_core.forward.generation import Prompts
from lora_core.forward.progress_hooks import silent
from lora_core.packing.packed_batch import PackedBatch
from lora_core.peft_format import verify
from tests.lora_core.scenarios import Submission, admit, config, dataset, state_bytes
from worker.children.trainer.outputs import BaseReference, exported

STEPS = 4
JOBS = {
    name: Submission(
        config=config(seed=seed, batch_size=4, num_steps=STEPS, slice_tokens=40, dropout=0.1),
        train=dataset(seed, [30, 21, 35, 17, 28]),
    )
    for seed, name in enumerate(("one", "two", "three"), start=1)
}
LARGE = {
    "large": Submission(config=config(seed=9, batch_size=2, num_steps=2, slice_tokens=40), train=dataset(9, [90, 95])),
}


def fails_at(number: int, act: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """Return `act`, except that call `number` raises `error`."""
    calls = iter(range(1, 10**9))

    def failing(*given: Any, **named: Any) -> Any:
        if next(calls) == number:
            raise error
        return act(*given, **named)

    return failing


@contextmanager
def failing(ranks: Ranks, module: Any, name: str, number: int, error: Exception) -> Iterator[None]:
    """Make call `number` of `module.name` raise `error`, on the second rank only."""
    usual = getattr(module, name)
    if ranks.rank == 1:
        setattr(module, name, fails_at(number, usual, error))
    try:
        yield
    finally:
        setattr(module, name, usual)


@contextmanager
def starved(ranks: Ranks, most_tokens: dict[int, int]) -> Iterator[None]:
    """Make every pass of more tokens than `most_tokens` of the rank run out of memory."""
    usual = passes.run_training

    def starving(base: BaseModel, pack: PackedBatch) -> Any:
        if sum(pack.sequence_lengths) > most_tokens.get(ranks.rank, 10**9):
            raise torch.OutOfMemoryError("simulated")
        return usual(base, pack)

    passes.run_training = starving
    try:
        yield
    finally:
        passes.run_training = usual


@contextmanager
def planned(engine: Engine) -> Iterator[list[tuple[int, bool]]]:
    """Yield a list that collects, for each training tick, the number of slices and whether blocks are recomputed."""
    run, found = engine._passes.run, list[tuple[int, bool]]()

    def recording(plan: TickPlan, jobs: Any) -> Any:
        if plan.kind == "train":
            found.append((len(plan.ranks), plan.checkpointed))
        return run(plan, jobs)

    engine._passes.run = recording
    try:
        yield found
    finally:
        engine._passes.run = run


def after_shortages(base: BaseModel, ranks: Ranks, shortages: int) -> dict[str, Any]:
    """Return the outcomes if job "one" has run out of memory before, and the ticks with it and after its eviction."""
    engine = Engine(base, EngineConfig(token_budget=200), ranks)
    for name, submission in JOBS.items():
        admit(engine, name, submission, shortages=shortages if name == "one" else 0)
    with planned(engine) as with_job:
        while engine._jobs["one"].unit is not None:
            engine.tick()
    ended = {"one": sha256(state_bytes(engine, "one")).hexdigest()}
    engine.evict("one")
    admit(engine, "after", JOBS["three"])
    with planned(engine) as after:
        while not engine.idle:
            engine.tick()
    ended |= {name: sha256(state_bytes(engine, name)).hexdigest() for name in ("two", "three")}
    return {"ended": ended, "with_job": with_job, "after": after}


def trained(base: BaseModel, ranks: Ranks, jobs: dict[str, Submission] = JOBS) -> dict[str, Any]:
    """Return digests of the jobs that finished, and the tick and step at which each other job ran out of memory."""
    engine = Engine(base, EngineConfig(token_budget=200), ranks)
    for name, submission in jobs.items():
        admit(engine, name, submission)
    refused: dict[str, list[int]] = {}
    num_ticks = 0
    while not engine.idle:
        num_ticks += 1
        try:
            engine.tick()
        except OutOfMemory as error:
            refused[error.job] = [num_ticks, engine.progress(error.job)[0]]
            engine.evict(error.job)
    ended = {name: sha256(state_bytes(engine, name)).hexdigest() for name in engine.jobs()}
    return {"ended": ended, "refused": refused}


def differ(base: BaseModel, ranks: Ranks) -> list[str]:
    """Return the messages of `compare_ranks` before and after one bit of the second rank's state is flipped."""
    engine = Engine(base, EngineConfig(), ranks)
    admit(engine, "one", JOBS["one"])
    engine.tick()
    messages: list[str] = []
    for _ in range(2):
        try:
            engine.compare_ranks("one")
            messages.append("")
        except RanksDiffer as error:
            messages.append(str(error))
        if ranks.rank == 1:
            engine._jobs["one"].adapter.m.view(torch.int32)[7] ^= 1
    return messages


def diverge(base: BaseModel, ranks: Ranks) -> dict[str, str]:
    """Return the outcome of a job that diverges in the weights or in a step of the second rank, or of both
    ranks, and of one whose norms have other last bits on the second rank."""
    own_steps = {
        "norm of one": ("step_sizes", torch.full((3,), math.nan), {1}),
        "update of one": ("stays_finite", False, {1}),
        "norm of both": ("step_sizes", torch.full((3,), math.nan), {0, 1}),
    }
    messages = {"weights of one": _outcome_of_one(base, ranks, breaks={1})}
    for where, (name, value, breaks) in own_steps.items():
        usual = getattr(job_module, name)
        if ranks.rank in breaks:
            setattr(job_module, name, lambda *_, value=value, **__: value)
        messages[where] = _outcome_of_one(base, ranks)
        setattr(job_module, name, usual)
    usual = job_module.step_sizes
    if ranks.rank == 1:
        job_module.step_sizes = lambda *args, **kwargs: usual(*args, **kwargs) * (1 + 2**-22)
    messages["last bits of one"] = _outcome_of_one(base, ranks)
    job_module.step_sizes = usual
    return messages


def _outcome_of_one(base: BaseModel, ranks: Ranks, *, breaks: Set[int] = frozenset()) -> str:
    """breaks: ranks whose weights are NaN from the second tick on."""
    engine = Engine(base, EngineConfig(), ranks)
    admit(engine, "one", JOBS["one"])
    try:
        while not engine.idle:
            for event in engine.tick():
                if isinstance(event, JobDiverged):
                    return f"diverged: {event.message}"
            if ranks.rank in breaks:
                engine._jobs["one"].adapter.p.fill_(math.nan)
        engine.compare_ranks("one")
    except RanksDiffer as error:
        return str(error)
    return "well"


def end(base: BaseModel, ranks: Ranks, way: str) -> str:
    """Return how this rank ended when the second failed: during a pass of the engine's probe, of a tick, of PEFT's
    verification, or of answers to prompts."""
    short = torch.OutOfMemoryError("simulated")
    failures = {
        "error": (language_model, "loss_by_head", 3, ValueError("the number 7\nagain")),
        "memory at the start": (language_model, "loss_by_head", 3, short),
        "memory in a tick": (passes, "run_training", 2, short),
        "memory in verification": (verify, "_last_logits", 2, short),
        "memory in answers": (continuous_batch, "hidden_states", 2, short),
    }
    try:
        with broadcast_failures(ranks), failing(ranks, *failures[way]):
            run_to_its_end(base, ranks, way)
    except Exception as error:  # noqa: BLE001  (the test checks which one)
        return f"{type(error).__name__}: {error}"
    return "well"


def run_to_its_end(base: BaseModel, ranks: Ranks, way: str) -> None:
    if way in ("error", "memory at the start", "memory in a tick"):
        trained(base, ranks)
        return
    engine = Engine(base, EngineConfig(token_budget=200), ranks)
    admit(engine, "one", JOBS["one"])
    if way == "memory in answers":
        generation = engine.generation({"one": Prompts(prompts=((1, 2, 3),), max_tokens=4)})
        while not ranks.broadcast(generation.is_complete):
            generation.advance()
        return
    while not engine.idle:
        engine.tick()
    with TemporaryDirectory() as folder:
        place = Path(folder) / "adapter"
        base_reference = BaseReference(name="tiny", revision=None)
        exported(engine, "one", place, base=base_reference, between=silent, on_verified_linear=silent, spans=[])


def main(base_dir: Path, out: Path, strategy: Strategy, way: str) -> None:
    torch.set_num_threads(1)
    ranks = distributed.join("cpu", silence_seconds=300)
    base = load_base(base_dir, dtype="float32", device="cpu", strategy=strategy, ranks=ranks)
    found: dict[str, Any] = {}
    short = torch.OutOfMemoryError("simulated")
    if not base.is_sharded:
        found["undisturbed"] = trained(base, ALONE)
        for module, name, number in (
            (passes, "run_training", 3),
            (job_module, "step_sizes", 5),
            (job_module, "optimizer_step", 5),
        ):
            with failing(ranks, module, name, number, short):
                found[name] = trained(base, ranks)
        with starved(ranks, {1: 48}):
            found["second short of more than a slice"] = trained(base, ranks)
        with starved(ranks, {1: 0}):
            found["second short of all"] = trained(base, ranks)
        with starved(ranks, {0: 48, 1: 48}):
            found["large"] = trained(base, ranks, JOBS | LARGE)
        found["shortages"] = [after_shortages(base, ranks, number) for number in range(3)]
    found["differ"] = differ(base, ranks)
    found["diverge"] = diverge(base, ranks)
    found["end"] = end(base, ranks, way)
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))
    os._exit(0)  # like a process that fails: without a shutdown of the process group


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), cast(Strategy, sys.argv[3]), sys.argv[4])
