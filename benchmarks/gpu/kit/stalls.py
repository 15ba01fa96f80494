"""Operations between two ticks, which every job of an engine waits for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.gpu.kit.kit import Kit
from benchmarks.gpu.kit.profiles import chosen
from benchmarks.gpu.kit.sessions import Session, rows_of, session
from benchmarks.gpu.kit.shapes import Shape


def stalls(kit: Kit) -> None:
    for shape in (kit.sizes.small, kit.sizes.large):
        with kit.attempt(shape.name):
            _measure(kit, shape)


def _measure(kit: Kit, shape: Shape) -> None:
    """Time each operation once after a first time, next to another job."""
    base, load = kit.base(shape), replace(kit.sizes.many, num_jobs=2)
    with session(base, load, chosen(kit), kit.sizes.budgets) as opened, TemporaryDirectory() as folder:
        opened.step()
        for number in (1, 2):
            _time(kit, opened, Path(folder) / str(number), f"{shape.name}, time {number}")


def _time(kit: Kit, opened: Session, folder: Path, named: str) -> None:
    engine, load = opened.engine, opened.load
    folder.mkdir()
    operations = {
        "admission": lambda: engine.admit(
            "new", replace(opened.configs[0], seed=9), rows_of(load, engine.base.vocab_size, 9)
        ),
        "checkpoint": lambda: engine.save_checkpoint("0", folder / "checkpoint"),
        "copies for a checkpoint that a thread writes": lambda: (
            engine.checkpoint_snapshot("0"),
            engine.adapter_snapshot("0", base_name="base"),
        ),
        "export with evidence": lambda: engine.export("0", folder / "export", base_name="base"),
        "export without evidence": lambda: engine.export("0", folder / "bare", base_name="base", has_evidence=False),
        "departure": lambda: engine.evict("new"),
        "admission from a checkpoint": lambda: engine.admit(
            "new", opened.configs[0], rows_of(load, engine.base.vocab_size, 0), resume_from=folder / "checkpoint"
        ),
        "departure again": lambda: engine.evict("new"),
    }
    for name, operation in operations.items():
        kit.synchronize()
        started = perf_counter()
        with kit.attempt(f"{name}, {named}"):
            operation()
            kit.synchronize()
            kit.tell(f"{name}, {named}", 1e3 * (perf_counter() - started), "ms")
