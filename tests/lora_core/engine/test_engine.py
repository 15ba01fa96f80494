"""The engine: admission, evaluations, events, shared ticks, and the example in its docstring."""

from __future__ import annotations

import doctest
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.numpy import save_file

from lora_core.adapter.optimizer import learning_rate_at
from lora_core.engine import engine as engine_module
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import ConfigError
from lora_core.events import JobEvaluated, JobFinished, JobStepped
from tests.lora_core.scenarios import Submission, admit, config, dataset, submissions

VALID = dataset(2, [12, 25, 4])
JOB = Submission(
    config=config(num_steps=5, evaluate_every_steps=2, batch_size=3, slice_tokens=25),
    train=dataset(1, [20, 33, 15, 7]),
    valid=VALID,
)


def run(engine: Engine) -> list:
    events = []
    while not engine.idle:
        events += engine.tick()
    return events


def test_name_is_in_use_while_its_job_is_loaded(load):
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "job", JOB)
    with pytest.raises(ConfigError, match="'job' is already loaded"):
        admit(engine, "job", JOB)
    engine.evict("job")
    admit(engine, "job", JOB)


def test_validation_set_is_evaluated_at_start_at_intervals_and_at_end(load):
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "job", JOB)

    events = run(engine)

    evaluated = [event.step for event in events if isinstance(event, JobEvaluated)]
    assert evaluated == [0, 2, 4, 5]
    assert [event.step for event in events if isinstance(event, JobStepped)] == [1, 2, 3, 4, 5]
    assert isinstance(events[0], JobEvaluated)
    assert events[-1] == JobFinished(job="job", step=5, kept_step=5)


def test_first_evaluation_is_the_loss_of_the_base_model(load):
    losses, correct = [], 0
    model = load("llama").model
    for index in range(VALID.num_rows):
        ids, mask = (torch.from_numpy(part.astype("int64")) for part in VALID.row(index))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1][mask[1:] == 1]
        labels = ids[1:][mask[1:] == 1]
        losses += F.cross_entropy(logits, labels, reduction="none").tolist()
        correct += int((logits.argmax(-1) == labels).sum())

    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "job", JOB)
    first = run(engine)[0]

    assert first.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert first.token_accuracy == correct / len(losses)
    assert first.num_supervised_tokens == len(losses) == VALID.num_supervised_tokens


def test_step_event_reports_its_tokens_and_learning_rate(load):
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "job", JOB)

    steps = [event for event in run(engine) if isinstance(event, JobStepped)]

    assert sum(step.num_tokens for step in steps[:4]) == 3 * JOB.train.num_tokens  # 4 steps of 3 rows of 4
    assert sum(step.num_supervised_tokens for step in steps[:4]) == 3 * JOB.train.num_supervised_tokens
    peak, schedule = JOB.config.optimizer.learning_rate, JOB.config.schedule
    assert [step.learning_rate for step in steps] == [
        learning_rate_at(step, peak=peak, schedule=schedule) for step in range(1, 6)
    ]


def test_trained_tokens_count_each_step_once_across_a_resume(load, tmp_path):
    job = Submission(config=config(num_steps=6, batch_size=3, slice_tokens=20), train=JOB.train, valid=JOB.train)
    first, second = Engine(load("llama"), EngineConfig(job_tokens=1)), Engine(load("llama"), EngineConfig())
    admit(first, "job", job)
    while first.progress("job")[0] < 3:
        first.tick()
    first.tick()  # into the fourth step, which the checkpoint omits
    first.save_checkpoint("job", tmp_path / "checkpoint")

    admit(second, "job", job, resume_from=tmp_path / "checkpoint")
    steps = [event for event in run(second) if isinstance(event, JobStepped)]

    num_tokens = sum(step.num_tokens for step in steps)
    assert [step.step for step in steps] == [4, 5, 6]
    assert second.job("job").progress.num_tokens == first.job("job").progress.num_tokens + num_tokens > num_tokens


def test_jobs_of_one_engine_share_ticks(load):
    engine = Engine(load("llama"), EngineConfig(token_budget=4096))
    job = Submission(config=config(num_steps=2), train=JOB.train)
    for name in ("a", "b", "c"):
        admit(engine, name, job)

    assert {event.job for event in engine.tick()} == {"a", "b", "c"}


def test_jobs_alternate_if_the_budget_is_too_small_for_both(load):
    engine = Engine(load("llama"), EngineConfig(token_budget=1))
    job = Submission(config=config(num_steps=2, batch_size=1), train=dataset(1, [20]))
    for name in ("a", "b"):
        admit(engine, name, job)

    order = [event.job for event in run(engine) if isinstance(event, JobStepped)]

    assert order == ["a", "b", "a", "b"]


def test_cached_gpu_memory_is_released_after_the_last_job(load, monkeypatch):
    released = []
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "first", JOB)
    admit(engine, "last", JOB)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append(engine.jobs()))
    engine.base.device = "cuda:0"

    engine.evict("first")
    engine.evict("last")

    assert released == [()]


def test_error_for_a_job_that_is_not_loaded_names_the_loaded_jobs(load, tmp_path):
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "here", submissions("llama")["tiny"])

    with pytest.raises(ConfigError, match="Job 'there' is not loaded") as caught:
        engine.export("there", tmp_path / "adapter", base_name="base")

    assert "here" in caught.value.remedy


def test_example_in_the_engine_module_prints_the_documented_output(base_dirs, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base_dirs["llama"])
    for seed, name in enumerate(("first", "second")):
        tokens = dataset(seed, [20, 30, 40])
        vectors = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
        save_file({name: vector for name, vector in vectors.items() if vector is not None}, f"{name}.safetensors")

    result = doctest.testmod(engine_module)

    assert result.attempted >= 7
    assert result.failed == 0
    assert LoraConfig.from_pretrained("adapter").base_model_name_or_path == "base"
