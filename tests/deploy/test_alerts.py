"""The dashboard and the alerts use only exposed metrics. Each alert fires when it should, and is documented."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules.yml"
DASHBOARD = ROOT / "deploy/grafana/lorry.json"
PAGE = (ROOT / "docs/reference/metrics.md").read_text("utf-8")
GUIDE = (ROOT / "docs/how-to/monitor.md").read_text("utf-8")
NAME = re.compile(r"\blorry_\w+")
SELECTOR = re.compile(r"\b(lorry_\w+)\{([^}]*)\}")
EXPOSED = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in re.findall(
    r"^\| `(lorry_\w+)` \| \w+ \| [^|]+ \| ([^|]*)\|", PAGE, re.MULTILINE
)}  # fmt: skip
"""The labels of each documented metric. tests/api/test_telemetry.py compares the page with the exposed metrics."""
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt install promtool)")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Return the panels other than rows."""
    return [panel for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """Return the expressions by the name of their alert or panel."""
    drawn = {f"{panel['title']} {target['refId']}": target["expr"] for panel in panels() for target in panel["targets"]}
    return {rule["alert"]: rule["expr"] for rule in rules()} | drawn


def base(name: str) -> str:
    """Return the metric of a series. The series of a histogram belong to one metric."""
    return re.sub(r"_(bucket|count|sum)$", "", name) if name not in EXPOSED else name


def test_queried_metrics_and_labels_are_exposed() -> None:
    assert len(EXPOSED) > 25
    for place, expression in expressions().items():
        named = {base(name) for name in NAME.findall(expression)}
        assert named, place
        assert named <= EXPOSED.keys(), f"{place}: {named - EXPOSED.keys()}"
        for name, selected in SELECTOR.findall(expression):
            labels = set(re.findall(r"(\w+)\s*[=!]", selected))
            assert labels <= EXPOSED[base(name)], f"{place}: {name} has no {labels}"


def test_every_metric_is_on_the_dashboard() -> None:
    drawn = {base(name) for panel in panels() for target in panel["targets"] for name in NAME.findall(target["expr"])}

    assert EXPOSED.keys() - drawn == set()


def test_service_metrics_are_not_summed_over_processes() -> None:
    """Every process exposes the same values, so a `sum` without an inner `max` counts each job once per process."""
    of_processes = ("lorry_http_", "lorry_background_", "lorry_webhook_tries")
    for place, expression in expressions().items():
        for name in re.findall(r"\bsum(?: by \([^)]*\))? ?\((?:rate|increase)?\(?(lorry_\w+)", expression):
            assert name.startswith(of_processes), place


def test_panels_have_unique_ids_and_do_not_overlap() -> None:
    found = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    cells = [
        (x, y)
        for panel in found
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in found}) == len(found)


def test_page_documents_exactly_the_alerts() -> None:
    section = GUIDE.partition("\n## Respond to alerts")[2].partition("\n## ")[0]

    assert re.findall(r"^\| `(Lorry\w+)` \| \w+ \| \S", section, re.MULTILINE) == [rule["alert"] for rule in rules()]
    documented = dict(re.findall(r"^\| `(Lorry\w+)` \| (\w+) \|", section, re.MULTILINE))
    assert documented == {rule["alert"]: rule["labels"]["severity"] for rule in rules()}


def test_every_alert_is_tested() -> None:
    rule_tests = yaml.safe_load((ROOT / "tests/deploy/rules_test.yml").read_text("utf-8"))
    cases = [case for test in rule_tests["tests"] for case in test.get("alert_rule_test", ())]

    assert {case["alertname"] for case in cases if case["exp_alerts"]} == {rule["alert"] for rule in rules()}


@needs_promtool
def test_documented_scrape_configurations_are_valid_and_find_the_pods(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    configurations = re.findall(r"^```yaml\n(scrape_configs:\n.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    for number, text in enumerate(configurations):
        (tmp_path / f"{number}.yml").write_text(text)
        words = [PROMTOOL, "check", "config", "--syntax-only", str(tmp_path / f"{number}.yml")]
        done = subprocess.run(words, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    (found,) = yaml.safe_load(configurations[1])["scrape_configs"][0]["kubernetes_sd_configs"]
    (api,) = [
        manifest
        for manifest in yaml.safe_load_all((ROOT / "deploy/kubernetes/lorry.yaml").read_text("utf-8"))
        if (manifest["kind"], manifest["metadata"]["name"]) == ("Deployment", "api")
    ]
    labels = api["spec"]["template"]["metadata"]["labels"]
    assert found["selectors"][0]["label"] == ",".join(f"{name}={value}" for name, value in labels.items())
    assert found["namespaces"] == {"names": [api["metadata"]["namespace"]]}


@needs_promtool
@pytest.mark.parametrize("words", [["check", "rules", str(RULES)], ["test", "rules", "tests/deploy/rules_test.yml"]])
def test_alert_rules_load_and_fire_as_expected(words: list[str]) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *words], cwd=ROOT, check=False, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
