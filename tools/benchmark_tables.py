"""Tables of the stored benchmark results, for the page docs/benchmarks.md."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks/results"


def benchmark(name: str) -> str:
    """Return when and where a result was measured, and its table."""
    result = _stored(RESULTS / f"{name}.json")
    machine = result["machine"]
    instructions = "".join(f", {each}" for each in machine.get("instructions", ())[:1])  # the fastest of them
    parts = [f"- Result file: `{name}.json`, {result['date']}"]
    parts += [f"- Machine: {machine['cpu']}, {machine['cores']} cores{instructions}", ""]
    parts += [result["note"], ""] if result["note"] else []
    parts += ["| Measurement | Result | Goal |", "|---|---|---|"]
    for finding in result["findings"]:
        verdict = "" if finding["goal"] is None else f"{_goal(finding)}: {'missed' if _is_missed(finding) else 'met'}"
        parts.append(f"| {_cell(finding['what'])} | {_figure(finding)} | {verdict} |")
    parts += [f"\nNot measured: {subject}. {reason}" for subject, reason in result["left_out"].items()]
    return "\n".join(parts)


def missed_goals() -> str:
    parts = ["| Benchmark | Measurement | Result | Goal |", "|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        result = _stored(path)
        for finding in filter(_is_missed, result["findings"]):
            cells = f"{_cell(finding['what'])} | {_figure(finding)} | {_goal(finding)}"
            parts.append(f"| `{result['theme']}` | {cells} |")
    return "\n".join(parts)


def _stored(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _figure(finding: dict[str, Any]) -> str:
    return f"{finding['figure']:,g} {_cell(finding['unit'])}".strip()


def _goal(finding: dict[str, Any]) -> str:
    return f"{'at most' if finding['is_limit'] else 'at least'} {finding['goal']:g}"


def _is_missed(finding: dict[str, Any]) -> bool:
    figure, goal = finding["figure"], finding["goal"]
    return goal is not None and (figure > goal if finding["is_limit"] else figure < goal)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
