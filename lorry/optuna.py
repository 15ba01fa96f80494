"""Runs a sweep with Optuna: the study's sampler chooses the parameters of each trial, and its pruner stops bad trials.

Optuna is an extra of the client: pip install "./client[optuna]". It is imported only when needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lorry.errors import Conflict, LorryError
from lorry.models import Sweep, Trial
from lorry.requests import Metric

if TYPE_CHECKING:
    import optuna

    from lorry.client import Lorry

Choose = Callable[["optuna.Trial"], Mapping[str, Any]]
"""Asks the trial for its parameters (`suggest_float`, …) and returns job fields by dotted path."""


def optimize(
    study: optuna.Study,
    choose: Choose,
    lorry: Lorry,
    *,
    trials: int,
    at_once: int = 4,
    metric: Metric = "valid_loss",
    poll_seconds: float = 1.0,
    **job: Any,
) -> Sweep:
    """Train `trials` trials, up to `at_once` at the same time, and report each result to the study. Return the finished
    sweep, with the best trial's adapter.

    `job` contains the fields that all trials share, as for `lorry.jobs.create`: model, training_file, validation_file
    and so on. A failed trial is reported to the study as failed. Any exception cancels the sweep.
    """
    goal = "minimize" if study.direction.name == "MINIMIZE" else "maximize"
    sweep = lorry.sweeps.create(
        model=job.pop("model"),
        training_file=job.pop("training_file"),
        validation_file=job.pop("validation_file", None),
        search={"type": "ask_tell", "trials": trials},
        objective={"metric": metric, "goal": goal},
        job=job,
    )
    try:
        driver = _Driver(study, choose, lorry, sweep.id, metric=metric)
        driver.run(trials, at_once, pause=lambda: lorry.sweeps.sleep(poll_seconds))
    except BaseException:
        _cancel(lorry, sweep.id)
        raise
    lorry.sweeps.close(sweep.id)
    return lorry.sweeps.wait(sweep.id, poll_seconds=poll_seconds)


class _Driver:
    """The running trials, each with its trial of the study."""

    def __init__(self, study: optuna.Study, choose: Choose, lorry: Lorry, sweep_id: str, *, metric: str) -> None:
        self._study = study
        self._choose = choose
        self._lorry = lorry
        self._sweep_id = sweep_id
        self._kind = metric.partition("_")[0]
        self._metric = metric
        self._running: dict[int, tuple[optuna.Trial, str]] = {}
        """The study's trial and the job id, by trial number."""
        self._reported: dict[int, int] = {}
        """The last reported step, by trial number."""
        self._pruned: set[int] = set()

    def run(self, trials: int, at_once: int, *, pause: Callable[[], None]) -> None:
        num_trials = 0
        while num_trials < trials or self._running:
            while num_trials < trials and len(self._running) < at_once:
                self._ask()
                num_trials += 1
            for number in list(self._running):
                self._poll(number)
            if self._running:
                pause()

    def _ask(self) -> None:
        trial = self._study.ask()
        made = self._lorry.sweeps.add_trial(self._sweep_id, self._choose(trial))
        self._running[made.number] = (trial, made.id)

    def _poll(self, number: int) -> None:
        found = self._lorry.sweeps.trial(self._sweep_id, number)
        trial, job_id = self._running[number]
        if found.is_final:
            del self._running[number]
            self._finish(trial, found)
            return
        is_new = found.step is not None and found.step > self._reported.get(number, 0)
        if is_new and number not in self._pruned:
            self._report(number, trial, job_id)

    def _report(self, number: int, trial: optuna.Trial, job_id: str) -> None:
        """Report each evaluation since the last poll, then ask the pruner."""
        for point in self._lorry.jobs.metrics(job_id, kind=self._kind):
            step, value = int(point["step"]), _value(point, self._metric)
            if step > self._reported.get(number, 0) and value is not None:
                trial.report(value, step)
                self._reported[number] = step
        if trial.should_prune():
            self._pruned.add(number)
            with suppress(Conflict):  # the trial has ended meanwhile
                self._lorry.sweeps.stop_trial(self._sweep_id, number)

    def _finish(self, trial: optuna.Trial, found: Trial) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr("job_id", found.id)
        trial.set_user_attr("fine_tuned_model", found.fine_tuned_model)
        if found.status == "succeeded" and found.value is not None:
            self._study.tell(trial, found.value)
        else:
            self._study.tell(trial, state=TrialState.PRUNED if found.reason == "pruned" else TrialState.FAIL)


def _value(point: Mapping[str, Any], metric: str) -> float | None:
    """Return the value of the metric at a point of a job's curve, as the service compares it."""
    name = metric.partition("_")[2]
    if name.startswith("reward_"):
        rewards: Mapping[str, float] = point.get("rewards") or {}
        return rewards.get(name.removeprefix("reward_"))
    return point.get("loss" if name == "loss" else "token_accuracy")


def _cancel(lorry: Lorry, sweep_id: str) -> None:
    with suppress(LorryError):  # the original exception is raised instead
        lorry.sweeps.cancel(sweep_id)
