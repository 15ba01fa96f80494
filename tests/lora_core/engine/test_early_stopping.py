"""Selection of the best evaluation, early stopping, and the weights that a job keeps."""

from dataclasses import replace

import pytest

from lora_core.config import EarlyStoppingConfig
from lora_core.engine.early_stopping import Selection
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import ConfigError
from lora_core.events import JobEvaluated, JobFinished
from lora_core.peft_format.export import packed_logits, pseudo_random_ids
from tests.lora_core.scenarios import Submission, admit, config, dataset, numbers, run_alone, weights

EARLY = numbers()["early_best"]


@pytest.mark.parametrize(
    ("losses", "min_delta", "best_step", "stops_at"),
    [
        ([3.0, 2.0, 1.0], 0.0, 3, None),
        ([3.0, 3.0, 3.0], 0.0, 1, 3),
        ([3.0, 2.0, 2.5, 1.5, 1.6, 1.7], 0.0, 4, 6),
        ([3.0, 2.9, 2.8, 2.7], 0.15, 4, None),  # slow decreases add up
        ([3.0, 2.99, 2.98, 2.97], 0.15, 3, 3),
        ([3.0, 2.75, 2.75], 0.25, 2, 3),  # the decrease must be greater than min_delta
    ],
)
def test_training_stops_after_two_evaluations_without_improvement(losses, min_delta, best_step, stops_at):
    rule, selection = EarlyStoppingConfig(patience=2, min_delta=min_delta), Selection()
    stopped = None
    for step, loss in enumerate(losses, start=1):
        selection.book(step=step, loss=loss, min_delta=min_delta)
        if selection.reason_to_stop(rule):
            stopped = step
            break
    assert (selection.best_step, stopped) == (best_step, stops_at)
    assert selection.reason_to_stop(None) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_early_stopped_job_keeps_the_chosen_weights_and_reports_why(load, dtype, keep):
    base = load("llama", dtype)
    engine = Engine(base, EngineConfig())
    admit(engine, "job", replace(EARLY, config=replace(EARLY.config, keep=keep)))
    ids = pseudo_random_ids(base, "probe", 0)
    events, seen, logits = [], {}, {}
    while not engine.idle:
        events += engine.tick()
        step = engine.progress("job")[0]
        if not engine.idle:
            seen[step] = weights(engine, "job").clone()
            logits[step] = packed_logits(base, engine._jobs["job"].adapter, ids)

    finished = events[-1]
    assert isinstance(finished, JobFinished)
    losses = {event.step: event.loss for event in events if isinstance(event, JobEvaluated) and event.step > 0}
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < finished.step < 30
    assert finished.step == max(losses)
    assert "has not fallen below" in (finished.stopped_early or "")
    assert "by more than 0.01 in 2 evaluations" in (finished.stopped_early or "")
    assert finished.kept_step == (best if keep == "best" else finished.step)
    if keep == "best":
        assert weights(engine, "job").equal(seen[best])
        assert packed_logits(base, engine._jobs["job"].adapter, ids).equal(logits[best])
    else:
        assert not weights(engine, "job").equal(seen[best])


def test_job_with_best_weights_but_no_early_stopping_runs_all_steps(load):
    job = replace(EARLY, config=replace(EARLY.config, num_steps=6, early_stopping=None))
    (*_, finished) = run_alone(load("llama"), job).events
    assert isinstance(finished, JobFinished)
    assert (finished.step, finished.stopped_early) == (6, None)
    assert 0 < finished.kept_step < 6


def test_memory_includes_the_best_weights(load):
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "job", EARLY)
    assert engine.memory()["adapter_bytes"] == 20 * engine.job("job").adapter.num_parameters


@pytest.mark.parametrize("options", [{"keep": "best"}, {"early_stopping": EarlyStoppingConfig(patience=1)}])
def test_options_that_need_evaluations_are_rejected_without_validation_set(load, options):
    engine = Engine(load("llama"), EngineConfig())
    job = Submission(config=replace(config(evaluate_every_steps=2), **options), train=dataset(1, [9, 7]))
    with pytest.raises(ConfigError, match="need a validation set"):
        admit(engine, "job", job)
    assert engine.jobs() == ()
