"""The guarantees of the engine, on tiny models: packed equals alone, resumed equals uninterrupted, and PEFT agrees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.kit.kit import Kit
from benchmarks.gpu.kit.sessions import without_probe
from lora_core.base_model.model import BaseModel, load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import JobStepped
from lora_core.forward.generation import Prompts
from lora_core.peft_format.verify import verify_export
from tests.lora_core.scenarios import VOCAB, Submission, admit, submissions, weights

QUESTION = Prompts(prompts=((3, 4, 5, 6, 7), (9, 10)), max_tokens=5)
TICK_TOKENS = 512
Weights = dict[str, Tensor]
CheckpointMode = Literal["auto", "always", "never"]


EARLY = ("a second run", "recomputed blocks")
"""Variants of all base models that run before the other checks of any, which take longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """Weights on the host and greedy answers after training, by job."""

    weights: Weights
    answers: dict[str, list[tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A tiny base model and its jobs after they trained in one pack. `scratch` is a folder for their files."""

    named: str
    base: BaseModel
    jobs: dict[str, Submission]
    trained: Trained
    scratch: Path


def properties(kit: Kit) -> None:
    with TemporaryDirectory() as folder:
        for family, model in tiny_models().items():
            model.save_pretrained(Path(folder) / family)
        found: list[Packed] = []
        for dtype in ("bfloat16", "float32") if kit.on_gpu else ("float32",):
            for family in ("llama", "gpt2"):
                with kit.attempt(f"{family} in {dtype}"):
                    base = load_base(Path(folder) / family, dtype=cast(Any, dtype), device=kit.sizes.device)
                    found.append(_packed(kit, base, family, f"{family} {dtype}", Path(folder)))
                    _compare_variants(kit, found[-1], early=True)
        for packed in found:
            _compare_variants(kit, packed, early=False)
        for packed in found:
            _compare_alone(kit, packed)


def tiny_models() -> dict[str, LlamaForCausalLM | GPT2LMHeadModel]:
    """Return an untied Llama with grouped-query attention, and a tied GPT-2, as the engine's tests use them."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.1)
    return {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2)}


def _packed(kit: Kit, base: BaseModel, family: str, named: str, folder: Path) -> Packed:
    jobs, scratch = submissions(family), folder / named
    jobs = {name: jobs[name] for name in kit.sizes.properties or jobs}
    if not kit.on_gpu:
        kit.tell_missing_gpu(f"{named}: invariance by the engine's probe", "a check on a CPU leaves the probe out")
    elif named == "llama bfloat16":
        kit.tell(f"{named}: invariance by the engine's probe", Engine(base, EngineConfig()).invariance, "text")
    trained = train(base, jobs, scratch=scratch / "exports", kit=kit, named=named)
    return Packed(named=named, base=base, jobs=jobs, trained=trained, scratch=scratch)


def _compare_variants(kit: Kit, packed: Packed, *, early: bool) -> None:
    variants: dict[str, dict[str, Any]] = {
        "a second run": {},
        "recomputed blocks": {"mode": "always"},
        "resumed after the first step": {"resumed": packed.scratch / "resumed"},
        "next to a job that leaves early": {"victim": next(iter(packed.jobs))},
    }
    for what, options in variants.items():
        if (what in EARLY) != early:
            continue
        with kit.attempt(f"{packed.named}: {what}"):
            found = train(packed.base, packed.jobs, **options).weights
            for name in found:
                _tell_difference(kit, f"{packed.named}: {name}, {what}", found, packed.trained.weights, only=name)


def _compare_alone(kit: Kit, packed: Packed) -> None:
    named, expected = packed.named, packed.trained
    for name, job in packed.jobs.items():
        with kit.attempt(f"{named}: {name} packed against alone"):
            alone = train(packed.base, {name: job})
            _tell_difference(kit, f"{named}: {name} packed against alone", expected.weights, alone.weights)
            same = alone.answers[name] == expected.answers[name]
            kit.tell(f"{named}: {name} answers the same packed as alone", same, "yes or no")


def train(
    base: BaseModel,
    jobs: dict[str, Submission],
    *,
    mode: CheckpointMode = "never",
    resumed: Path | None = None,
    victim: str | None = None,
    scratch: Path | None = None,
    kit: Kit | None = None,
    named: str = "",
) -> Trained:
    """Train the jobs in one pack, and answer prompts with each.

    With `resumed`, a folder, each job continues from a checkpoint after its first step. `victim` leaves after its first
    step. With `scratch` and `kit`, each job is exported and verified by PEFT, and the report is recorded.
    """
    with without_probe(), _detaching(base):
        engine = Engine(base, EngineConfig(token_budget=TICK_TOKENS, checkpoint_blocks=mode))
        for name, job in jobs.items():
            admit(engine, name, job)
        while not engine.idle:
            for event in engine.tick():
                if not isinstance(event, JobStepped) or event.step != 1:
                    continue
                if resumed is not None:
                    engine.save_checkpoint(event.job, resumed / event.job)
                    engine.evict(event.job)
                    admit(engine, event.job, jobs[event.job], resume_from=resumed / event.job)
                elif event.job == victim:
                    engine.evict(event.job)
        if scratch is not None and kit is not None:
            _verify(kit, engine, named, scratch)
        return Trained(
            weights={job: weights(engine, job).cpu().clone() for job in engine.jobs()}, answers=_answers(engine)
        )


def _answers(engine: Engine) -> dict[str, list[tuple[int, ...]]]:
    generation = engine.generation(dict.fromkeys(engine.jobs(), QUESTION))
    while not generation.is_complete:
        generation.advance()
    return generation.answers()


def _verify(kit: Kit, engine: Engine, named: str, folder: Path) -> None:
    for job in engine.jobs():
        with kit.attempt(f"{named}: {job} verified by PEFT"):
            engine.export(job, folder / job, base_name="tiny")
            report = asdict(verify_export(engine.base, folder / job))
            passed = bool(report.pop("passed"))
            details = {key: value if isinstance(value, int | float) else str(value) for key, value in report.items()}
            kit.tell(f"{named}: {job} verified by PEFT", passed, "yes or no", **details)


def _tell_difference(kit: Kit, name: str, found: Weights, expected: Weights, *, only: str | None = None) -> None:
    """Record the norm of the difference of a job's weights, as a fraction of their norm."""
    job = only or next(iter(expected))
    ours, theirs = found[job].double(), expected[job].double()
    difference = float((ours - theirs).norm() / theirs.norm())
    kit.tell(name, difference, "fraction of the norm", bits_equal=torch.equal(found[job], expected[job]))


@contextmanager
def _detaching(base: BaseModel) -> Iterator[None]:
    """Detach the engine from the base model after the block."""
    try:
        yield
    finally:
        if base.attachment is not None:
            base.attachment.detach()
            base.attachment = None
