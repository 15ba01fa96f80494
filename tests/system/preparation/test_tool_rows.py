"""Rows with tools for a base model whose chat template ignores them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from catalog.plans import plans
from catalog.spec.job import JobRequest
from catalog.states import JobState
from tests.worker_site import BASE, worker_site

ROWS = Path(__file__).parents[2] / "catalog" / "datasets" / "openai_rows" / "tool_calls.jsonl"


def test_plan_and_job_fail_with_the_reason(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        rows = site.upload_file(ROWS)
        request = JobRequest.model_validate({"model": BASE, "training_file": rows})
        caller = replace(site.caller, scopes=frozenset({"jobs:write"}))
        plan = plans.create(site.db, caller=caller, request=request, settings=site.settings)
        site.work_until_done()
        job_id = site.submit(rows, max_steps=2)

        site.work_until_done()

        planned = plans.get(site.db, project_id=site.caller.project_id, plan_id=plan.id)
        job = site.job(job_id)
        assert (planned.state, job.state) == ("failed", JobState.FAILED), site.log()
        for error in (planned.error, job.error):
            assert error is not None
            assert error["code"] == "template_without_tools"
            assert "does not render tools" in error["message"]
            assert "Use a base model whose template supports tools" in str(error)
