"""Sweeps and their trials."""

from __future__ import annotations

from sqlalchemy import Boolean, ForeignKey, Index, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Table

IS_DUE = text("due_at IS NOT NULL")


class Sweep(Table):
    """Several jobs that were submitted as one. Like its jobs, it is never deleted."""

    __tablename__ = "sweeps"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[float]
    created_by: Mapped[str]
    idempotency_key: Mapped[str | None]
    body_digest: Mapped[str]
    requested: Mapped[Json]
    """The request as it was received."""
    seed: Mapped[int]
    num_trials: Mapped[int]
    max_concurrent: Mapped[int | None]
    """Maximum number of unfinished trials; None: no limit."""
    rungs: Mapped[Json | None]
    """min_steps and reduction_factor; None: no trial is stopped."""
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    state: Mapped[str] = mapped_column(String(16))
    """A `catalog.spec.sweep.SweepState`."""
    num_created: Mapped[int]
    """Trials that exist: they have the numbers from 0 to num_created - 1."""
    is_closed: Mapped[bool] = mapped_column(Boolean)
    """Whether the sweep creates no further trials."""
    cancel_requested: Mapped[bool] = mapped_column(Boolean)
    due_at: Mapped[float | None]
    """When the controller next has work for the sweep. None: not before one of its trials finishes."""
    finished_at: Mapped[float | None]
    best_job: Mapped[str | None]
    """Job id of the best trial, whose adapter is the result of the sweep. Set once the sweep is final."""
    error: Mapped[Json | None]
    """code and message: why no further trial could be created."""
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "project_id", "idempotency_key", unique=True),
        Index(None, "created_by", "created_at"),
        Index(None, "finished_at"),
        Index("ix_sweeps_due", "due_at", sqlite_where=IS_DUE, postgresql_where=IS_DUE),
    )


class Trial(Table):
    """A job of a sweep."""

    __tablename__ = "trials"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id"))
    number: Mapped[int]
    parameters: Mapped[Json]
    score: Mapped[float]
    """Current value of the objective, with the sign that makes lower better; infinite before the first value."""
    step: Mapped[int | None]
    """The step at which `score` was measured."""
    recent: Mapped[Json | None]
    """For an objective measured in training: the last values, with their steps."""
    reached_step: Mapped[int | None]
    """The step at which the trial reached a rung where the controller has not judged it yet."""
    reached_score: Mapped[float | None]
    """The score at that step."""
    pruner_state: Mapped[Json | None]
    """Attributes of the trial in Optuna's pruner: its score at each rung where it was judged."""
    stopped: Mapped[str | None] = mapped_column(Text)
    """A sentence that explains why the trial was stopped before its last step."""
    __table_args__ = (
        Index(None, "sweep_id", "number", unique=True),
        Index(None, "sweep_id", "score", "number"),
    )

    @property
    def rung(self) -> int | None:
        """The last rung that the trial reached."""
        num_rungs = len(self.pruner_state or {}) + (self.reached_step is not None)
        return num_rungs - 1 if num_rungs else None
