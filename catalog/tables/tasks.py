"""Background tasks, and when each project's were last claimed."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, Integer
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Leased, Table


class Task(Leased, Table):
    """Background work on one row of another table, the subject. It is leased to the process that does it, and deleted
    once it is done; see catalog/tasks/task_queue.py."""

    __tablename__ = "tasks"
    kind: Mapped[str] = mapped_column(primary_key=True)
    """A `task_queue.TaskKind`."""
    subject: Mapped[str] = mapped_column(primary_key=True)
    """Primary key of the row that is worked on."""
    project_id: Mapped[str | None] = mapped_column(ForeignKey("projects.id"))
    """None: it belongs to no project."""
    run_after: Mapped[float]
    """When the next attempt is due."""
    priority: Mapped[int] = mapped_column(Integer, default=0)
    """Class among the tasks of the project; the lowest is first, with aging (task_queue.AGING_SECONDS)."""
    num_attempts: Mapped[int] = mapped_column(default=0)
    """Attempts that count toward the kind's maximum, with the current one."""
    __table_args__ = (Index(None, "kind", "run_after"),)


class TaskTurn(Table):
    """When a task of a project was last claimed. The project whose last claim is the oldest is next."""

    __tablename__ = "task_turns"
    kind: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    claimed_at: Mapped[float]
