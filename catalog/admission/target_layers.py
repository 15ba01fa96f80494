"""Target layers of jobs, resolved before the transaction that accepts the jobs.

Patterns come from clients and may take a tenth of a second to match; a write transaction must not wait for that. The
transaction looks the layers up by the base model's digest and the adapter's shape. If one of them has changed since,
the layers are resolved again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from catalog.errors import Conflict, InvalidRequest
from catalog.spec.job import ParentSpec
from catalog.spec.lora import LoraSpec
from catalog.spec.target_modules import Adapted, Matcher, adapted
from catalog.tables.storage import BaseModelRow

MAX_ATTEMPTS = 3
"""Attempts to resolve the layers and to use them before the base model changes."""
Result = TypeVar("Result")


class TargetsOutdated(Conflict):
    """The base model, or the adapter that the job continues, changed after the layers had been resolved."""

    def __init__(self, base_name: str, parent: str | None) -> None:
        changed = f"Base model {base_name!r}" + (f" or parent adapter {parent!r}" if parent else "")
        super().__init__("job_source_changed", changed=changed, param="model")


class Targets:
    """Layers by base model and adapter shape. All patterns share one time limit: see `target_modules.Matcher`."""

    def __init__(self) -> None:
        self._matcher = Matcher()
        self._found: dict[tuple[str, str | None, str], list[Adapted] | InvalidRequest] = {}

    def resolve(self, base: BaseModelRow, lora: LoraSpec) -> None:
        """Find the layers, or the reason why the shape is invalid. Do not call it within a write transaction."""
        key = _key(base, lora)
        if key in self._found:
            return
        try:
            self._found[key] = adapted(base.description or {}, lora, base_name=base.name, matcher=self._matcher)
        except InvalidRequest as error:
            self._found[key] = error

    def of(self, base: BaseModelRow, lora: LoraSpec, *, parent: ParentSpec | None = None) -> list[Adapted]:
        """Return the resolved layers. Raises InvalidRequest if the shape is invalid, TargetsOutdated if unresolved.

        parent: the adapter that the job continues.
        """
        found = self._found.get(_key(base, lora))
        if found is None:
            raise TargetsOutdated(base.name, parent.name if parent else None)
        if isinstance(found, InvalidRequest):
            raise found
        return found


def retried(act: Callable[[], Result]) -> Result:
    """Call `act`, which resolves layers and uses them in a transaction. Retry it if the layers are outdated by then.

    Raises TargetsOutdated after MAX_ATTEMPTS.
    """
    for _ in range(MAX_ATTEMPTS - 1):
        with suppress(TargetsOutdated):
            return act()
    return act()


def _key(base: BaseModelRow, lora: LoraSpec) -> tuple[str, str | None, str]:
    return base.name, base.digest, lora.model_dump_json()
