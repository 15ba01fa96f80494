"""The panel that asks an adapter and its base model a question."""

from __future__ import annotations

from qa.fuzz.answering import answering
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service


def trained(service: Service) -> str:
    job = seed.submit(service.seeded, "support")
    seed.prepare(service.seeded)
    return seed.succeed(service.seeded, seed.claim(service.seeded)[job.id])


def test_both_models_answer_a_question(fresh: Service, visit: Visit) -> None:
    adapter_id = trained(fresh)
    visitor = visit(fresh)
    visitor.open(f"#/adapters/{adapter_id}")
    panel = visitor.page.get_by_role("region", name="Try it")

    with answering(fresh.seeded.db):
        panel.get_by_label("Message").fill("Where is my parcel?")
        panel.get_by_role("button", name="Send").click()
        for model in ("This adapter", "Base model"):
            panel.locator("section", has_text=model).get_by_text("Yes", exact=True).wait_for()

    panel.get_by_role("button", name="Send").wait_for()
    visitor.assert_accessible()


def test_empty_question_is_not_sent(fresh: Service, visit: Visit) -> None:
    adapter_id = trained(fresh)
    visitor = visit(fresh)
    visitor.open(f"#/adapters/{adapter_id}")
    panel = visitor.page.get_by_role("region", name="Try it")

    panel.get_by_role("button", name="Send").click()

    assert panel.get_by_label("Message").evaluate("element => element === document.activeElement")
    assert panel.locator("section").count() == 0
