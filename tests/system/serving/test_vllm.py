"""A real vLLM serves a trained adapter of a real model: deployed, called, restarted and undeployed through Lorry."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from catalog.registry import base_models
from tests import tiny_base
from tests.services.programs import Missing
from tests.system.api_process import Service, api_process
from tests.system.serving.vllm_server import vllm_python
from tests.worker_site import PEPPER, WorkerSite, bare_site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
BASE = "smollm2"
PATIENCE_SECONDS = 600.0
QUESTIONS = ("What color is the lorry?", "Name three rivers in Europe.", "How do bridges carry loads?")
REFERENCE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, questions = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
found = []
for question in json.loads(questions):
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    end = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    whole = model.generate(**ids, do_sample=False, max_new_tokens=24, eos_token_id=end, pad_token_id=0)
    new = [int(token) for token in whole[0, ids["input_ids"].shape[1]:]]
    finish = "stop" if new[-1] in end else "length"
    found.append([*(tokenizer.decode([token]) for token in new if token not in end), finish])
print(json.dumps(found))
"""


@dataclass(kw_only=True)
class VllmSite:
    site: WorkerSite
    service: Service
    python: Path
    base_folder: Path
    adapter_folder: Path
    port: int
    model: str

    @contextmanager
    def vllm(self) -> Iterator[None]:
        """Run vLLM until the end of the block."""
        command = [str(self.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.base_folder)]
        command += ["--served-model-name", "smol"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "512"]
        command += ["--enable-lora", "--max-lora-rank", "16", "--enforce-eager", "--max-num-seqs", "4"]
        environment = {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": "",
        }
        with (self.site.folder / "process-vllm.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=os.environ | environment, cwd=self.site.folder, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                yield
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(60)

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.service.key}"}
        return httpx.Client(base_url=f"{self.service.url}/v1", headers=headers, trust_env=False, timeout=600)

    def answer(self, http: httpx.Client, question: str) -> list[str]:
        """Return the tokens of the adapter's greedy answer through Lorry, and why it ended."""
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        response = http.post("/chat/completions", json={**body, "max_tokens": 24, "logprobs": True})
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        tokens = [token["token"] for token in choice["logprobs"]["content"]]
        assert "".join(tokens) == choice["message"]["content"]
        return [*tokens, choice["finish_reason"]]

    def loaded(self) -> list[str]:
        """Return the adapters that vLLM lists."""
        found = httpx.get(f"http://127.0.0.1:{self.port}/v1/models", trust_env=False, timeout=30).json()["data"]
        return [model["id"] for model in found if model["parent"] is not None]

    def num_answered(self) -> int:
        """Return the completions that vLLM has finished."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", trust_env=False, timeout=30).text
        lines = [line for line in text.splitlines() if line.startswith("vllm:request_success_total")]
        return sum(int(float(line.rpartition(" ")[2])) for line in lines)


@pytest.fixture
def place(tmp_path: Path, real_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmSite]:
    monkeypatch.setenv("LORRY_REQUESTS_PER_MINUTE", "0")  # the test polls
    try:
        python = vllm_python()
    except Missing as missing:
        pytest.skip(f"needs vLLM: {missing}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with (
        bare_site(tmp_path, LORRY_IDLE_SECONDS="600", LORRY_LEASE_SECONDS="30") as site,
        api_process(site.settings.data_dir, pepper=PEPPER) as service,
    ):
        site.patience_seconds = PATIENCE_SECONDS
        base_models.add(site.db, name=BASE, kind="gguf", source=str(real_gguf))
        site.start_worker()
        site.wait_until(lambda: base_models.get(site.db, BASE).state == "ready")
        job = site.submit(
            site.upload(24), model=BASE, max_steps=6, lora={"rank": 8}, optimizer={"learning_rate": 0.002},
            max_length=128,
        )  # fmt: skip
        site.wait_for_end(job)
        assert site.job(job).state == "succeeded", site.log()
        folder = tmp_path / "served"
        folder.mkdir()
        digest = base_models.get(site.db, BASE).digest
        yield VllmSite(
            site=site, service=service, python=python,
            base_folder=tiny_base.without_end_of_turn(site.settings.bases_dir() / str(digest), tmp_path / "base"),
            adapter_folder=folder, port=port, model=site.adapter(job).name,
        )  # fmt: skip


def test_deployed_adapter_answers_as_in_peft_and_survives_a_restart_of_vllm(place: VllmSite, tmp_path: Path) -> None:
    path = f"/adapters/{place.model}/deployments"
    with place.http() as http:

        def endpoint() -> Any:
            return http.get("/serving/endpoints/gpu").json()

        def deployment() -> Any:
            return http.get(path).json()["data"][0]

        with place.vllm():
            body = {"name": "gpu", "base_model": BASE, "url": f"http://127.0.0.1:{place.port}"}
            made = http.post("/serving/endpoints", json={**body, "adapter_folder": str(place.adapter_folder)})
            assert made.status_code == 200, made.text
            place.site.wait_until(lambda: endpoint()["state"] == "ready")
            assert http.post(path, json={"endpoint": "gpu"}).status_code == 200
            place.site.wait_until(lambda: deployment()["state"] == "ready")

            assert endpoint()["verification"]["max_diff"] < 0.01
            verified = deployment()["verification"]
            assert verified["max_diff"] < 0.01
            assert verified["distinguishes"]
            assert place.loaded() == [place.model]
            before = place.num_answered()
            answers = [place.answer(http, question) for question in QUESTIONS]
            assert place.num_answered() == before + len(QUESTIONS)
            assert answers == _peft(place, tmp_path)
            assert "stop" in {answer[-1] for answer in answers}, "no answer has ended at the end of its turn"

        place.site.wait_until(lambda: endpoint()["state"] == "unreachable")
        assert [place.answer(http, question) for question in QUESTIONS] == answers  # the built-in engine

        with place.vllm():
            place.site.wait_until(lambda: deployment()["state"] == "ready")
            assert place.loaded() == [place.model]
            assert [place.answer(http, question) for question in QUESTIONS] == answers

            assert http.delete(f"{path}/gpu").status_code == 200
            place.site.wait_until(lambda: http.get(path).json()["data"] == [])
            assert place.loaded() == []
            assert list(place.adapter_folder.glob("*/*")) == []


def _peft(place: VllmSite, folder: Path) -> list[list[str]]:
    """Return the tokens of the greedy answers of transformers and PEFT, and why they ended."""
    store = place.site.store
    (adapter,) = place.site.adapters()
    store.fetch(store.get_manifest(adapter.artifact), folder / "adapter")
    command = [sys.executable, "-W", "ignore", "-c", REFERENCE, str(place.base_folder), str(folder / "adapter")]
    command.append(json.dumps(QUESTIONS))
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=600).stdout)
