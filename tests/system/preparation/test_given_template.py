"""Chats without a chat template, and rows with tools for a template that ignores them, are rejected with the reason."""

from __future__ import annotations

import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from catalog.datasets.chat_templates import TEMPLATES
from catalog.errors import InvalidRequest
from catalog.plans import plans
from catalog.registry import base_models
from catalog.spec.job import JobRequest
from catalog.states import JobState
from tests import tiny_base
from tests.worker_site import BASE, worker_site


def test_chats_are_rejected_until_the_base_model_has_a_template(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        source = shutil.copytree(tiny_base.make(tmp_path / "tiny"), tmp_path / "plain")
        (source / "chat_template.jinja").unlink()
        site.import_base(source, name="plain")
        rows = site.upload_file(tiny_base.write_chat(tmp_path / "chats.jsonl", 8))
        caller = replace(site.caller, scopes=frozenset({"jobs:write"}))
        request = JobRequest.model_validate({"model": "plain", "training_file": rows})

        with pytest.raises(InvalidRequest, match="base model 'plain' has no chat template") as refused:
            plans.create(site.db, caller=caller, request=request, settings=site.settings)
        assert "--chat-template chatml|" in str(refused.value.remedy)

        base_models.add(site.db, name="chatty", kind="folder", source=str(source), chat_template="chatml")
        site.work_until_done()
        job_id = site.submit(rows, max_steps=2, model="chatty")
        site.work_until_done()

        job = site.job(job_id)
        assert job.state == JobState.SUCCEEDED, site.log()
        given = base_models.get(site.db, "chatty")
        files = {file["path"]: file["digest"] for file in (given.manifest or {})["files"]}
        assert files["chat_template.jinja"] == sha256(TEMPLATES["chatml"].encode()).hexdigest()
        assert given.digest != base_models.get(site.db, "plain").digest


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
