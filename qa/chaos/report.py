"""The report of a run: a line for each row when it ends, and a table of all rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qa.chaos.audit.findings import INVARIANTS, Finding, Invariant
from qa.chaos.scenario import NotHere, Row


@dataclass(kw_only=True, slots=True)
class Outcome:
    """The outcome of one row on one database."""

    row: Row
    database: str
    seen: str = ""
    failure: str | None = None
    """An assertion of the row failed, or an error occurred. Then nothing was audited."""
    left_out: str | None = None
    """The reason why it could not run."""
    findings: Sequence[Finding] = field(default_factory=list[Finding])
    seconds: float = 0.0

    @property
    def is_well(self) -> bool:
        return self.failure is None and not self.findings

    def line(self) -> str:
        verdict = "left out" if self.left_out else "ok" if self.is_well else "FAILED"
        told = self.left_out or self.failure or self.seen
        found = "".join(f"\n    {finding}" for finding in self.findings)
        return f"{verdict:8} {self.row.name:32} {self.database:10} {self.seconds:6.1f} s  {told}{found}"

    def mark(self, invariant: Invariant) -> str:
        if self.left_out or self.failure:
            return "-"
        return "no" if any(finding.invariant == invariant for finding in self.findings) else "yes"


def table(outcomes: Sequence[Outcome], not_here: Iterable[NotHere]) -> str:
    """Return a Markdown table with a summary."""
    head = ("Row", "Database", "What was done", "What was seen", *INVARIANTS, "Seconds")
    lines = [_line(head), _line("---" for _ in head)]
    for outcome in outcomes:
        seen = f"left out: {outcome.left_out}" if outcome.left_out else outcome.seen
        seen = f"**failed**: {outcome.failure}" if outcome.failure else seen
        marks = [outcome.mark(invariant) for invariant in INVARIANTS]
        lines.append(
            _line((outcome.row.name, outcome.database, outcome.row.fault, seen, *marks, f"{outcome.seconds:.0f}"))
        )
    lines += [
        _line((row.name, "", row.fault, f"not here: {row.why}", *("-" for _ in INVARIANTS), "")) for row in not_here
    ]
    return "\n".join([*lines, "", _sum(outcomes)])


def _sum(outcomes: Sequence[Outcome]) -> str:
    """Return the summary. A row that was left out does not count as tried."""
    num_left_out = sum(outcome.left_out is not None for outcome in outcomes)
    num_failed = sum(not outcome.is_well for outcome in outcomes)
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    tried = f"{len(outcomes) - num_left_out} tried, {num_left_out} left out, {num_failed} failed"
    return f"{tried}, {minutes:.0f} minutes."


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
