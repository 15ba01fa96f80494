"""The dashboard and the alerts ask for numbers that there are; each alert fires when it should, and is explained."""

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
"""By name the labels of what the page tells, which tests/api/test_telemetry.py compares with what is exposed."""
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool isn't there (Debian: apt install promtool)")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Those that draw something."""
    return [panel for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """By where each stands."""
    drawn = {f"{panel['title']} {target['refId']}": target["expr"] for panel in panels() for target in panel["targets"]}
    return {rule["alert"]: rule["expr"] for rule in rules()} | drawn


def base(name: str) -> str:
    """Of a histogram's series the name of the histogram."""
    return re.sub(r"_(bucket|count|sum)$", "", name) if name not in EXPOSED else name


def test_every_number_that_is_asked_for_is_exposed_with_the_labels_by_which_it_is_asked() -> None:
    assert len(EXPOSED) > 25
    for place, expression in expressions().items():
        named = {base(name) for name in NAME.findall(expression)}
        assert named, place
        assert named <= EXPOSED.keys(), f"{place}: {named - EXPOSED.keys()}"
        for name, selected in SELECTOR.findall(expression):
            labels = set(re.findall(r"(\w+)\s*[=!]", selected))
            assert labels <= EXPOSED[base(name)], f"{place}: {name} has no {labels}"


def test_every_number_is_on_the_dashboard() -> None:
    drawn = {base(name) for panel in panels() for target in panel["targets"] for name in NAME.findall(target["expr"])}

    assert EXPOSED.keys() - drawn == set()


def test_numbers_of_the_service_are_never_added_up_over_processes() -> None:
    """Every process tells the same: `sum` of them, without `max` within, would count each job once for each process."""
    of_processes = ("lorry_http_", "lorry_background_", "lorry_webhook_tries")
    for place, expression in expressions().items():
        for name in re.findall(r"\bsum(?: by \([^)]*\))? ?\((?:rate|increase)?\(?(lorry_\w+)", expression):
            assert name.startswith(of_processes), place


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
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


def test_every_alert_is_explained_on_the_page_and_no_other() -> None:
    section = GUIDE.partition("\n## Respond to alerts")[2].partition("\n## ")[0]

    assert re.findall(r"^\| `(Lorry\w+)` \| \w+ \| \S", section, re.MULTILINE) == [rule["alert"] for rule in rules()]
    told = dict(re.findall(r"^\| `(Lorry\w+)` \| (\w+) \|", section, re.MULTILINE))
    assert told == {rule["alert"]: rule["labels"]["severity"] for rule in rules()}


def test_every_alert_is_tested() -> None:
    told = yaml.safe_load((ROOT / "tests/deploy/rules_test.yml").read_text("utf-8"))
    cases = [case for test in told["tests"] for case in test.get("alert_rule_test", ())]

    assert {case["alertname"] for case in cases if case["exp_alerts"]} == {rule["alert"] for rule in rules()}


@needs_promtool
def test_prometheus_takes_the_pages_configurations_and_in_kubernetes_finds_the_apis_pods(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    told = re.findall(r"^```yaml\n(scrape_configs:\n.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    for number, text in enumerate(told):
        (tmp_path / f"{number}.yml").write_text(text)
        words = [PROMTOOL, "check", "config", "--syntax-only", str(tmp_path / f"{number}.yml")]
        done = subprocess.run(words, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    (found,) = yaml.safe_load(told[1])["scrape_configs"][0]["kubernetes_sd_configs"]
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
def test_prometheus_loads_the_rules_and_they_fire_when_they_should(words: list[str]) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *words], cwd=ROOT, check=False, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
