"""An OpenAI script with tool calls trains a model and calls it, with another address and another key only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from catalog.registry import base_models
from tests.system.api_process import Service, api_process
from tests.worker.children.tokenizer.test_tool_calls import HERMES
from tests.worker_site import PEPPER, ROOT, WorkerSite, worker_site

sys.path.insert(0, str(ROOT / "examples"))

import openai_unchanged  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.timeout(900)


def run(service: Service, folder: Path) -> list[str]:
    """Run the script as a user does. Returns the lines that it printed."""
    environment = {**os.environ, "OPENAI_BASE_URL": f"{service.url}/v1", "OPENAI_API_KEY": service.key}
    command = [sys.executable, str(ROOT / "examples" / "openai_unchanged.py")]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=800
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def add_base(site: WorkerSite, source: Path, folder: Path) -> None:
    """Add a copy of the base model under OpenAI's name, with a chat template that renders tools."""
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(HERMES)
    base_models.add(site.db, name=openai_unchanged.MODEL, kind="folder", source=str(folder))


@pytest.mark.slow
def test_real_model_learns_the_call_and_answers_as_in_peft(tmp_path: Path, real_gguf: Path) -> None:
    with (
        worker_site(tmp_path / "site", LORRY_IDLE_SECONDS="120") as site,
        api_process(site.settings.data_dir, pepper=PEPPER) as service,
    ):
        base_models.add(site.db, name="plain", kind="gguf", source=str(real_gguf))
        site.work_until_done()
        plain = site.settings.bases_dir() / str(base_models.get(site.db, "plain").digest)
        add_base(site, plain, tmp_path / "base")
        site.start_worker()
        site.wait_until(lambda: base_models.get(site.db, openai_unchanged.MODEL).state == "ready")

        status, *calls = run(service, tmp_path)

        assert status.startswith("succeeded"), site.log()
        (call,) = calls
        name, _, arguments = call.partition(" ")
        assert name == "get_current_weather"
        assert json.loads(arguments) == {"location": "Paris", "format": "celsius"}
