"""Passes that enter a model family between its blocks, and failures of the trial that checks such an entry."""

import itertools
from dataclasses import replace

import pytest
import torch

from lora_core.base_model import patching
from lora_core.base_model.model import BaseModel, load_base
from lora_core.engine import prefix_cache
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import OutOfMemory
from tests.lora_core import classifiers
from tests.lora_core.engine.test_prefix_cache import AMPLE, is_as_alone, top, upper_jobs
from tests.lora_core.scenarios import Submission, admit, config, dataset
from tests.lora_core.test_families import FAMILIES, save


@pytest.mark.parametrize("num_passes", [0, 1, 4])
@pytest.mark.parametrize(
    "shortage", [torch.OutOfMemoryError("simulated"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_in_the_entry_trial_rejects_only_that_job(load, monkeypatch, num_passes, shortage):
    base, job = load("llama"), upper_jobs()["dropped"]
    engine = Engine(base, EngineConfig(**AMPLE))
    passes, run = itertools.count(), prefix_cache.hidden_states

    def limited(*arguments):
        if next(passes) == num_passes:
            raise shortage
        return run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prefix_cache, "hidden_states", limited)
        with pytest.raises(OutOfMemory, match="'early'"):
            admit(engine, "early", job)
    assert engine.jobs() == ()

    admit(engine, "late", job)
    while not engine.idle:
        engine.tick()

    assert engine.prefixes.reused_tokens > 0
    assert is_as_alone(engine, "late", base, job)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoder_can_be_entered_between_its_blocks(tmp_path, family):
    base = load_base(save(family, tmp_path, **FAMILIES[family]), dtype="float32", device="cpu")
    job = Submission(config=top(config(batch_size=3, num_steps=3, dropout=0.1)), train=dataset(1, [20, 33, 15]))
    engine = Engine(base, EngineConfig(**AMPLE))
    admit(engine, "job", job)

    while not engine.idle:
        engine.tick()

    assert engine.prefixes.reused_tokens == 2 * 68
    assert is_as_alone(engine, "job", base, job)


@pytest.mark.parametrize("family", classifiers.FAMILIES)
def test_every_classifier_can_be_entered_between_its_blocks(tmp_path, family):
    base = classifiers.classifier(family, tmp_path / "base")
    job = classifiers.classification_jobs(with_types=family == "bert")["three"]
    job = replace(job, config=top(replace(job.config, num_steps=5, schedule=replace(job.config.schedule, num_steps=5))))
    engine = Engine(base, EngineConfig(**AMPLE))
    admit(engine, "job", job)

    while not engine.idle:
        engine.tick()

    assert engine.prefixes.reused_tokens > engine.prefixes.computed_tokens > 0
    assert is_as_alone(engine, "job", base, job)


def is_never_entered(base: BaseModel) -> bool:
    """Return whether a job on the upper block runs all blocks and ends with the bytes of a run without a cache."""
    job = Submission(config=top(config(batch_size=4, num_steps=3)), train=dataset(1, [20, 28, 15, 17]))
    engine = Engine(base, EngineConfig(**AMPLE))
    admit(engine, "job", job)
    while not engine.idle:
        engine.tick()
    return engine.prefixes.reused_tokens == 0 and is_as_alone(engine, "job", base, job)


def test_family_whose_blocks_pass_on_more_than_hidden_states_is_not_entered(load, monkeypatch):
    base = load("llama")
    handed: list[torch.Tensor] = []
    block = type(base.model.model.layers[0])
    forward = block.forward

    def with_a_side_door(self, hidden, *args, **kwargs):
        found = forward(self, hidden, *args, **kwargs)
        if self is base.model.model.layers[0]:
            handed[:] = [hidden]
            return found
        return found + handed[0]

    monkeypatch.setattr(block, "forward", with_a_side_door)
    monkeypatch.setattr(patching, "faster_blocks", lambda *_: [])  # it assumes that Llama's blocks have no side channel

    assert is_never_entered(base)


def test_family_whose_blocks_share_state_of_a_lower_one_is_not_entered(load, monkeypatch):
    base = load("llama")
    shared: dict[int, torch.Tensor] = {}  # by number of tokens of a pass; every part of the pass has fewer
    block = type(base.model.model.layers[0])
    forward = block.forward

    def with_a_shelf(self, hidden, *args, **kwargs):
        found = forward(self, hidden, *args, **kwargs)
        if self is base.model.model.layers[0]:
            shared[hidden.shape[1]] = hidden
            return found
        return found + shared.pop(hidden.shape[1])

    monkeypatch.setattr(block, "forward", with_a_shelf)
    monkeypatch.setattr(patching, "faster_blocks", lambda *_: [])  # it assumes that Llama's blocks have no side channel

    assert is_never_entered(base)


@pytest.mark.parametrize("num_passes", [1, 2])
def test_device_failure_in_the_entry_trial_is_raised(load, monkeypatch, num_passes):
    engine = Engine(load("llama"), EngineConfig(**AMPLE))
    passes, run = itertools.count(), prefix_cache.hidden_states

    def failing(*arguments):
        if next(passes) == num_passes:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return run(*arguments)

    monkeypatch.setattr(prefix_cache, "hidden_states", failing)

    with pytest.raises(torch.AcceleratorError):
        admit(engine, "job", upper_jobs()["dropped"])
