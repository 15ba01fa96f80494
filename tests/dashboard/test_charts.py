"""The charts on the page of a job: labels, line styles, text summaries and tables."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, expect

from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service

RECORD_DASHES = """
window.dashes = [];
const setDash = CanvasRenderingContext2D.prototype.setLineDash;
CanvasRenderingContext2D.prototype.setLineDash = function (dash) {
  window.dashes.push([...dash]);
  setDash.call(this, dash);
};
"""
RECORD_TEXTS = """
window.texts = [];
const fillText = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  const { a, e } = this.getTransform();
  const width = this.measureText(text).width;
  const before = {right: width, end: width, center: width / 2}[this.textAlign] ?? 0;
  window.texts.push([text, a * (x - before) + e]);
  fillText.call(this, text, x, y);
};
"""


def test_chart_labels_are_not_cut_off(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, width=390)
    visitor.page.add_init_script(RECORD_TEXTS)
    rates = [0.00011 + step * 1.5e-7 for step in range(60)]
    points = [{"step": step, "loss": 1.0, "kind": "train", "learning_rate": rate} for step, rate in enumerate(rates)]
    curve = {"object": "list", "data": points, "has_more": False}
    visitor.page.route("**/metrics?kind=train", lambda route: route.fulfill(json=curve))
    visitor.page.route("**/stream", lambda route: route.abort())  # otherwise the stream adds the job's own points

    visitor.open(filled.address("#/jobs/titles-r16"))
    visitor.page.locator("figure").filter(has_text="Learning rate").locator("canvas").wait_for()

    texts: list[tuple[str, float]] = visitor.page.evaluate("window.texts")
    assert any(text.startswith("1.1") for text, _ in texts), texts
    assert [text for text, left in texts if left < 0] == []


def test_chart_summary_and_table_agree(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open(filled.address("#/jobs/docstrings-r16"))

    chart = visitor.page.get_by_role("img", name=re.compile(r"^Training loss went from .* at step 240\."))
    summary = chart.get_attribute("aria-label") or ""
    visitor.page.get_by_text("Values as a table: Cross-entropy").click()

    rows = visitor.page.get_by_role("table", name="Cross-entropy by step").get_by_role("row")
    last = rows.last.inner_text().split()
    assert last[0] == "240"
    assert f"to {last[1]} at step 240" in summary


def test_validation_curve_is_recognizable_without_color(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, scheme="dark")
    visitor.page.add_init_script(RECORD_DASHES)

    visitor.open(filled.address("#/jobs/titles-r16"))

    chart = visitor.page.get_by_role("figure").filter(has_text="Cross-entropy")
    expect(chart.locator(".key")).to_have_count(3)
    train, smoothed, valid = (chart.locator(".key").nth(index) for index in range(3))
    assert [key.inner_text().split()[0] for key in (train, smoothed, valid)] == ["train", "smoothed", "validation"]
    assert [_line_style(key) for key in (train, smoothed, valid)] == ["1px none", "2.5px none", "2.5px 5px, 3.5px"]
    assert [key.locator("circle").count() for key in (train, smoothed, valid)] == [0, 0, 1]
    assert visitor.page.evaluate("window.dashes.some((dash) => dash.length > 0)")


def _line_style(key: Locator) -> str:
    style = "(line) => (({strokeWidth: a, strokeDasharray: b}) => `${a} ${b}`)(getComputedStyle(line))"
    return str(key.locator("line").evaluate(style))
