"""The layers that jobs are to adapt, resolved before the transaction that accepts the jobs.

Patterns come from clients and may take a tenth of a second to match; a write transaction must not wait for that. The
transaction then asks for the layers by the base model's digest and the adapter's shape. If one of them has changed
since, the layers are resolved again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from catalog.errors import Conflict, InvalidRequest
from catalog.spec.lora import LoraSpec
from catalog.spec.target_modules import Adapted, Matcher, adapted
from catalog.tables.storage import BaseModelRow

MAX_ATTEMPTS = 3
"""To resolve the layers and use them before the base model changes."""
Result = TypeVar("Result")


class TargetsOutdated(Conflict):
    """The base model, or the adapter that the job continues, changed after the layers had been resolved."""

    def __init__(self, base_name: str) -> None:
        super().__init__(
            f"The base model {base_name!r} changed while the request was checked.",
            code="model_changed",
            remedy="Send the request again.",
            param="model",
        )


class Targets:
    """Layers by base model and adapter shape. All patterns together have one time limit: see `linears.Matcher`."""

    def __init__(self) -> None:
        self._matcher = Matcher()
        self._found: dict[tuple[str, str | None, str], list[Adapted] | InvalidRequest] = {}

    def resolve(self, base: BaseModelRow, lora: LoraSpec) -> None:
        """Find the layers, or the reason for which the shape is invalid. Never within a write transaction."""
        key = _key(base, lora)
        if key in self._found:
            return
        try:
            self._found[key] = adapted(base.description or {}, lora, base_name=base.name, matcher=self._matcher)
        except InvalidRequest as error:
            self._found[key] = error

    def of(self, base: BaseModelRow, lora: LoraSpec) -> list[Adapted]:
        """Raises InvalidRequest for a shape that the base model can't have; TargetsOutdated if it was not resolved."""
        found = self._found.get(_key(base, lora))
        if found is None:
            raise TargetsOutdated(base.name)
        if isinstance(found, InvalidRequest):
            raise found
        return found


def retried(act: Callable[[], Result]) -> Result:
    """Call `act`, which resolves layers and uses them in a transaction, again each time that they are outdated.

    Raises TargetsOutdated after MAX_ATTEMPTS.
    """
    for _ in range(MAX_ATTEMPTS - 1):
        with suppress(TargetsOutdated):
            return act()
    return act()


def _key(base: BaseModelRow, lora: LoraSpec) -> tuple[str, str | None, str]:
    return base.name, base.digest, lora.model_dump_json()
