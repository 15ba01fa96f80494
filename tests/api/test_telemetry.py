"""Exposed metrics match docs/reference/metrics.md, follow Prometheus conventions and have bounded labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from api.background import periodic
from api.background.periodic import PERIODIC
from api.deps import Services
from api.telemetry import Telemetry
from catalog.errors import Unavailable
from catalog.fleet import metrics, workers
from catalog.lifecycle import recovery
from tests.catalog.world import World

PAGE = (Path(__file__).parents[2] / "docs/reference/metrics.md").read_text("utf-8")
ROW = re.compile(r"^\| `(lorry_\w+)` \| (\w+) \| [^|]+ \| ([^|]*)\| \S", re.MULTILINE)
BASE_UNITS = ("seconds", "bytes", "ratio", "celsius", "watts")
OTHER_UNITS = ("milliseconds", "minutes", "hours", "megabytes", "gigabytes", "percent", "milliwatts")
LABELS = {
    *("method", "route", "status", "outcome", "task"),
    *("state", "priority", "reason", "work", "base_model", "host", "device"),
}


def exposed(telemetry: Telemetry, world: World) -> dict[str, Metric]:
    text = telemetry.expose(metrics.read(world.db)).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.fixture
def families(services: Services, world: World, client: TestClient) -> dict[str, Metric]:
    """Return the metrics of a service with a worker, a running job and a webhook attempt."""
    about = {"host": "node-1", "pid": 1, "version": "1", "memory_bytes": 100}
    workers.register_worker(world.db, worker_id="w1", devices=[{"kind": "cuda", "indices": [0]}], **about)  # pyright: ignore
    claim = world.running()
    device = {
        "utilization_ratio": 0.5, "memory_used_bytes": 5, "temperature_celsius": 60, "power_watts": 300,
    }  # fmt: skip
    report = {"tokens_per_second": 9.0, "predicted_bytes": 7, "peak_bytes": 6, "device": device}
    base = claim.job.base_digest
    workers.worker_beat(world.db, "w1", resident_base=base, trainer_id="t1", report=report)
    client.get("/v1/files")
    services.telemetry.count_try(is_delivered=True)
    return exposed(services.telemetry, world)


def test_page_documents_every_metric_with_type_and_labels(families: dict[str, Metric]) -> None:
    documented = {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in ROW.findall(PAGE)}

    assert documented == {name: (family.type, _labels(family)) for name, family in _named(families)}


def test_names_end_in_their_unit_and_counters_in_total(families: dict[str, Metric]) -> None:
    for name, family in _named(families):
        assert name.endswith("_total") == (family.type == "counter"), name
        assert not [unit for unit in OTHER_UNITS if unit in name], name
        in_the_middle = [unit for unit in BASE_UNITS if f"_{unit}_" in name.removesuffix("_total")]
        assert in_the_middle == [], f"{name}: the unit must be the suffix"


def test_labels_are_bounded_and_contain_no_ids(families: dict[str, Metric], world: World) -> None:
    for _, family in _named(families):
        for sample in family.samples:
            assert set(sample.labels) <= LABELS | {"le"}, sample.name
            assert not {"w1", "t1", world.caller.project_id, "ours"} & set(sample.labels.values()), sample


def test_trainer_and_device_metrics_name_host_and_device(families: dict[str, Metric]) -> None:
    on = {"host": "node-1", "device": "cuda:0"}
    found = {name: [(s.labels, s.value) for s in family.samples] for name, family in families.items()}

    assert found["lorry_trainer_tokens_per_second"] == [(on, 9.0)]
    assert found["lorry_trainer_memory_predicted_bytes"] == [(on, 7.0)]
    assert found["lorry_trainer_memory_peak_bytes"] == [(on, 6.0)]
    assert found["lorry_device_utilization_ratio"] == [(on, 0.5)]
    assert found["lorry_device_memory_bytes"] == [(on, 100.0)]
    assert found["lorry_trainers"] == found["lorry_trainer_jobs"] == [({"base_model": "smol"}, 1.0)]


def test_background_runs_are_counted_by_outcome(
    services: Services, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs() -> dict[tuple[str, str], float]:
        family = exposed(services.telemetry, world)["lorry_background_runs"]
        totals = [sample for sample in family.samples if sample.name.endswith("_total")]
        return {(s.labels["task"], s.labels["outcome"]): s.value for s in totals}

    def done_at() -> dict[str, float]:
        family = exposed(services.telemetry, world)["lorry_background_last_success_timestamp_seconds"]
        return {sample.labels["task"]: sample.value for sample in family.samples}

    def away(*_: object, **__: object) -> int:
        raise Unavailable("database_unavailable")

    names = {each.name for each in PERIODIC}
    assert set(runs()) == {(task, outcome) for task in names for outcome in ("done", "failed")}
    began = done_at()
    monkeypatch.setattr(recovery, "expire", away)
    monkeypatch.setattr(periodic, "clean", away)
    for each in PERIODIC:
        each.run(services)

    counted = {key: number for key, number in runs().items() if number}
    failed = {"recover", "collect_garbage"}
    assert counted == {(name, "failed" if name in failed else "done"): 1 for name in names}
    after = done_at()
    assert {task for task in names if after[task] > began[task]} == names - failed


def test_unknown_background_tasks_are_not_counted() -> None:
    """The series would begin with its first event, so no alert would detect a task that never ran."""
    telemetry = Telemetry(["recover"], ["streams"])

    with pytest.raises(AssertionError, match="unknown periodic run: recovery"):
        telemetry.count_run("recovery", is_done=True)
    with pytest.raises(AssertionError, match="unknown background task: stream"):
        telemetry.count_restart("stream")

    counted = generate_latest(telemetry.registry).decode()
    assert 'task="recover"' in counted
    assert 'task="recovery"' not in counted
    assert 'task="stream"' not in counted


def _named(families: dict[str, Metric]) -> Iterator[tuple[str, Metric]]:
    """Yield the metrics under the names of queries, without the `_created` series that the library adds."""
    for name, family in families.items():
        if not name.endswith("_created"):
            yield (f"{name}_total" if family.type == "counter" else name), family


def _labels(family: Metric) -> frozenset[str]:
    return frozenset(label for sample in family.samples for label in sample.labels if label != "le")
