"""An OpenAI script with tool calls trains a model and calls it, with another address and another key only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from catalog.registry import base_models
from lorry import Lorry
from tests.system.api_process import Service, api_process
from tests.worker.children.tokenizer.test_tool_calls import HERMES
from tests.worker_site import PEPPER, ROOT, WorkerSite, worker_site

sys.path.insert(0, str(ROOT / "examples"))

import openai_unchanged  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.timeout(900)
REFERENCE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, precision, messages, tools = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, precision))
model = PeftModel.from_pretrained(model, adapter).eval()
prompt = tokenizer.apply_chat_template(
    json.loads(messages), tools=json.loads(tools), add_generation_prompt=True, return_tensors="pt", return_dict=True
)
ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
whole = model.generate(**prompt, do_sample=False, max_new_tokens=60, eos_token_id=ends, pad_token_id=ends[0])
answer = whole[0, prompt["input_ids"].shape[1] :].tolist()
print(json.dumps(tokenizer.decode(answer[:-1] if answer[-1] in ends else answer)))
"""
"""Prints the raw text of PEFT's greedy answer, with special tokens but without the end token."""


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


def answer_of_peft(service: Service, base: Path, model: str, messages: list[Any], folder: Path) -> str:
    """Pull the adapter as a user does, and return the raw text of its answer in transformers and PEFT."""
    with Lorry(service.url, service.key) as client:
        client.adapters.pull(model, folder)
        precision = client.adapters.get(model).precision
    given = [str(base), str(folder), str(precision), json.dumps(messages), json.dumps(openai_unchanged.TOOLS)]
    command = [sys.executable, "-W", "ignore", "-c", REFERENCE, *given]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=300).stdout)


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

        model, question = status.split()[1], [{"role": "user", "content": "What is the weather in Paris?"}]
        with service.client() as client:
            completion = client.chat.completions.create(
                model=model,
                messages=question,  # pyright: ignore[reportArgumentType]
                tools=openai_unchanged.TOOLS,
                temperature=0,
                max_tokens=60,
                logprobs=True,
            )
        logprobs = completion.choices[0].logprobs
        assert logprobs is not None
        raw = "".join(token.token for token in logprobs.content or [])
        assert name in raw
        assert raw == answer_of_peft(service, tmp_path / "base", model, question, tmp_path / "adapter")
