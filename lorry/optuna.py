"""A study of Optuna drives a sweep: its sampler chooses each trial's parameters, its pruner ends those that do badly.

Optuna is imported when a study is given, and is an extra of the client: pip install "lorry[optuna]".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lorry.errors import Conflict, LorryError
from lorry.models.sweeps import Sweep, Trial
from lorry.requests import Metric

if TYPE_CHECKING:
    import optuna

    from lorry.client import Lorry

Choose = Callable[["optuna.Trial"], Mapping[str, Any]]
"""Asks the trial for its parameters (`suggest_float`, …); returns fields of a job by their dotted paths."""


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
    """Train `trials` trials, up to `at_once` together, tell the study what each came to, and return the sweep at its
    end, with the best trial's adapter.

    job: what all trials share, as `lorry.jobs.create` takes it: model, training_file, validation_file and so on.
    A trial that fails is told to the study as failed. Whatever is raised here cancels the sweep.
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
    """The trials that are under way, each with the study's."""

    def __init__(self, study: optuna.Study, choose: Choose, lorry: Lorry, sweep_id: str, *, metric: str) -> None:
        self._study = study
        self._choose = choose
        self._lorry = lorry
        self._sweep_id = sweep_id
        self._kind = metric.partition("_")[0]
        self._metric = metric
        self._under_way: dict[int, tuple[optuna.Trial, str]] = {}
        """By number: the study's trial, and the id of the job."""
        self._reported: dict[int, int] = {}
        """By number: the last step that was reported."""
        self._pruned: set[int] = set()

    def run(self, trials: int, at_once: int, *, pause: Callable[[], None]) -> None:
        num_trials = 0
        while num_trials < trials or self._under_way:
            while num_trials < trials and len(self._under_way) < at_once:
                self._ask()
                num_trials += 1
            for number in list(self._under_way):
                self._look(number)
            if self._under_way:
                pause()

    def _ask(self) -> None:
        trial = self._study.ask()
        made = self._lorry.sweeps.add_trial(self._sweep_id, self._choose(trial))
        self._under_way[made.number] = (trial, made.id)

    def _look(self, number: int) -> None:
        found = self._lorry.sweeps.trial(self._sweep_id, number)
        trial, job_id = self._under_way[number]
        if found.is_final:
            del self._under_way[number]
            self._tell(trial, found)
            return
        is_new = found.step is not None and found.step > self._reported.get(number, 0)
        if is_new and number not in self._pruned:
            self._report(number, trial, job_id)

    def _report(self, number: int, trial: optuna.Trial, job_id: str) -> None:
        """Each evaluation since the last look; then the pruner is asked."""
        for point in self._lorry.jobs.metrics(job_id, kind=self._kind):
            step, value = int(point["step"]), _value(point, self._metric)
            if step > self._reported.get(number, 0) and value is not None:
                trial.report(value, step)
                self._reported[number] = step
        if trial.should_prune():
            self._pruned.add(number)
            with suppress(Conflict):  # it has ended meanwhile
                self._lorry.sweeps.stop_trial(self._sweep_id, number)

    def _tell(self, trial: optuna.Trial, found: Trial) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr("job_id", found.id)
        trial.set_user_attr("fine_tuned_model", found.fine_tuned_model)
        if found.status == "succeeded" and found.value is not None:
            self._study.tell(trial, found.value)
        else:
            self._study.tell(trial, state=TrialState.PRUNED if found.reason == "pruned" else TrialState.FAIL)


def _value(point: Mapping[str, Any], metric: str) -> float | None:
    """Of a point of a job's curve, as the service compares by it."""
    name = metric.partition("_")[2]
    if name.startswith("reward_"):
        rewards: Mapping[str, float] = point.get("rewards") or {}
        return rewards.get(name.removeprefix("reward_"))
    return point.get("loss" if name == "loss" else "token_accuracy")


def _cancel(lorry: Lorry, sweep_id: str) -> None:
    with suppress(LorryError):  # what was raised first is told
        lorry.sweeps.cancel(sweep_id)
