"""`python -m tools.fingerprint`: prints digests of the results of all kinds of jobs, for comparison across a change.

Each job of the engine's tests is trained alone, and again with all others of its base model, where it is stopped after
its first step and resumed from its checkpoint. A digest covers the values of the job's events and the bytes of the
exported adapter. Digests depend on the processor and on torch, so compare only those of one machine. The exit status is
1 if a packed run differs from the run alone.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_core.base_model.model import BaseModel, load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event, JobFinished
from tests.lora_core.classifiers import classification_jobs, classifier
from tests.lora_core.drawn_jobs import ABSURD, NAN_AT_ONCE, drawn_job
from tests.lora_core.scenarios import VOCAB, Submission, admit, submissions

DRAWN = [number for number in range(12) if number % 8 not in (NAN_AT_ONCE, ABSURD)]
TOKEN_BUDGET = 96
"""Small, so that most steps take several forward passes."""


def digests(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the name of the kind, the digest of the job alone, and the digest of the packed and resumed job."""
    for name, base, jobs in _groups(folder):
        alone = {job: _alone(base, submission, folder) for job, submission in jobs.items()}
        packed = _packed(base, jobs, folder)
        for job in jobs:
            yield f"{name}/{job}", alone[job], packed[job]


def _groups(folder: Path) -> Iterator[tuple[str, BaseModel, dict[str, Submission]]]:
    for family, model in _models().items():
        model.save_pretrained(folder / family)
        for dtype in ("float32", "bfloat16"):
            base = load_base(folder / family, dtype=dtype, device="cpu")
            drawn = {f"drawn-{number}": drawn_job(family, number) for number in DRAWN}
            yield f"{family}-{dtype}", base, submissions(family) | (drawn if dtype == "float32" else {})
    for family in ("bert", "llama"):
        base = classifier(family, folder / f"{family}-classifier")
        yield f"{family}-classifier", base, classification_jobs(with_types=family == "bert")


def _models() -> dict[str, Any]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    llama = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=256, **sizes)
    gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    llama.initializer_range = gpt2.initializer_range = 0.1
    return {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2)}


def _alone(base: BaseModel, submission: Submission, folder: Path) -> str:
    engine = Engine(base, EngineConfig())
    admit(engine, "job", submission)
    events: list[Event] = []
    while not engine.idle:
        events += engine.tick()
    return _digest(engine, "job", events, folder)


def _packed(base: BaseModel, jobs: dict[str, Submission], folder: Path) -> dict[str, str]:
    engine = Engine(base, EngineConfig(token_budget=TOKEN_BUDGET))
    for name, submission in jobs.items():
        admit(engine, name, submission)
    events: dict[str, list[Event]] = {name: [] for name in jobs}
    resumed: set[str] = set()
    found: dict[str, str] = {}
    while not engine.idle:
        for event in engine.tick():
            events[event.job].append(event)
            if isinstance(event, JobFinished):
                found[event.job] = _digest(engine, event.job, events[event.job], folder)
                engine.evict(event.job)
        for name in set(engine.jobs()) - resumed:
            if engine.progress(name)[0] >= 1:
                resumed.add(name)
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    engine.save_checkpoint(name, Path(place) / "checkpoint")
                    engine.evict(name)
                    admit(engine, name, jobs[name], resume_from=Path(place) / "checkpoint")
    return found


def _digest(engine: Engine, job: str, events: list[Event], folder: Path) -> str:
    """Return the digest of the events' values, without the name of the job, and of the exported adapter."""
    digest = hashlib.sha256()
    for event in events:
        digest.update(repr([value for value in astuple(event) if value != job]).encode())
    with tempfile.TemporaryDirectory(dir=folder) as place:
        engine.export(job, Path(place) / "adapter", base_name="base")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            digest.update((Path(place) / "adapter" / name).read_bytes())
    return digest.hexdigest()[:16]


def main() -> int:
    argparse.ArgumentParser(prog="python -m tools.fingerprint", description=__doc__).parse_args()
    torch.set_num_threads(1)
    has_difference = False
    with tempfile.TemporaryDirectory() as folder:
        for name, alone, packed in digests(Path(folder)):
            has_difference = has_difference or alone != packed
            print(f"{alone} {name}" + ("" if alone == packed else f" (packed and resumed: {packed})"), flush=True)
    return int(has_difference)


if __name__ == "__main__":
    sys.exit(main())
