"""Faults of a serving endpoint on which an adapter is deployed: killed during answers, and back without adapters."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from catalog.registry import base_models
from qa.chaos.service import PATIENCE_SECONDS, FaultSite
from tests.services.running import free_port
from tests.worker_site import BASE

PATH = "/v1/chat/completions"
QUESTION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What color is the lorry?"}],
    "temperature": 0,
    "max_tokens": 100,
}
NUM_STREAMS = 3
NUM_BEFORE_FAULT = 2
"""Chunks that each client has read when the fault is injected."""
ENDPOINT = "/v1/serving/endpoints/peft"
TRAINED: dict[str, Any] = {"max_steps": 60, "optimizer": {"learning_rate": 0.01}}
"""Enough steps for an adapter whose answers clearly differ from those of the base model."""


@dataclass(kw_only=True)
class _Serving:
    """An inference server, and an adapter that is deployed on it."""

    site: FaultSite
    base_folder: Path
    port: int
    model: str = ""

    def start(self) -> subprocess.Popen[bytes]:
        return self.site.start([sys.executable, "-m", "qa.chaos.peft_server", str(self.base_folder), str(self.port)])

    def deploy(self) -> None:
        """Train an adapter, register the server, deploy the adapter there, and wait until it answers."""
        job_id = self.site.submit_small(**TRAINED)
        self.site.wait_for_success(job_id, is_small=False)
        self.model = self.site.adapter(job_id).name
        folder = self.site.folder / "served"
        folder.mkdir()
        body = {"name": "peft", "base_model": BASE, "url": f"http://127.0.0.1:{self.port}"}
        made = self.site.ask("POST", "/v1/serving/endpoints", json={**body, "adapter_folder": str(folder)})
        assert made.status_code == 200, made.text
        made = self.site.ask("POST", f"/v1/adapters/{self.model}/deployments", json={"endpoint": "peft"})
        assert made.status_code == 200, made.text
        self.wait_for("ready")

    def wait_for(self, state: str) -> None:
        """Wait until the deployment has this state."""
        self.site.wait_until(lambda: self.deployment()["state"] == state)

    def deployment(self) -> dict[str, Any]:
        (found,) = self.site.ask("GET", f"{ENDPOINT}/deployments").json()["data"]
        return found

    def ask(self) -> httpx.Response:
        return self.site.ask("POST", PATH, json={**QUESTION, "model": self.model}, timeout=PATIENCE_SECONDS)

    def of_server(self, path: str) -> dict[str, Any]:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", trust_env=False, timeout=PATIENCE_SECONDS).json()

    def num_answered(self) -> int:
        return self.of_server("/answered")["answered"]

    def stream(self, begun: threading.Semaphore) -> str:
        """Read a streamed answer. Returns `complete`, or the code of the error that ended it. begun: released after
        the first chunks."""
        headers = {"authorization": f"Bearer {self.site.key}"}
        body = {**QUESTION, "model": self.model, "stream": True}
        with (
            httpx.Client(base_url=self.site.url, trust_env=False, timeout=PATIENCE_SECONDS) as client,
            client.stream("POST", PATH, json=body, headers=headers) as response,
        ):
            if response.status_code != 200:
                return str(json.loads(response.read())["error"]["code"])
            lines = [line.removeprefix("data: ") for line in self._lines(response, begun)]
        if lines[-1] == "[DONE]":
            return "complete"
        return str(json.loads(lines[-1])["error"]["code"])

    def _lines(self, response: httpx.Response, begun: threading.Semaphore) -> list[str]:
        found: list[str] = []
        for line in response.iter_lines():
            if line:
                found.append(line)
                if len(found) == NUM_BEFORE_FAULT:
                    begun.release()
        return found


def kill_endpoint(site: FaultSite) -> str:
    """kill -9 of the server during answers, and later a server without adapters in its place."""
    site.start_api()
    site.start_worker()
    digest = base_models.get(site.db, BASE).digest
    serving = _Serving(site=site, base_folder=site.settings.bases_dir() / str(digest), port=free_port())
    server = serving.start()
    serving.deploy()
    assert serving.deployment()["verification"]["distinguishes"], serving.deployment()
    assert serving.ask().status_code == 200
    assert serving.num_answered() == 1, "the endpoint did not answer"

    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(serving.stream, begun) for _ in range(NUM_STREAMS)]
        for _ in streams:
            assert begun.acquire(timeout=PATIENCE_SECONDS), site.log()
        server.kill()
        server.wait()
        meanwhile = [serving.ask() for _ in range(3)]
        ends = [stream.result(PATIENCE_SECONDS) for stream in streams]
    assert set(ends) == {"answer_interrupted"}, ends
    assert [response.status_code for response in meanwhile] == [200] * 3, [response.text for response in meanwhile]
    site.wait_until(lambda: site.ask("GET", ENDPOINT).json()["state"] == "unreachable")
    assert serving.ask().status_code == 200

    serving.start()
    serving.wait_for("ready")
    names = [model["id"] for model in serving.of_server("/v1/models")["data"] if model["parent"] is not None]
    assert names == [serving.model], names
    assert serving.deployment()["verification"]["passed"]
    assert serving.ask().status_code == 200
    assert serving.num_answered() == 1, "the endpoint did not answer after it came back"
    site.wait_until(lambda: site.num_open_requests() == 0)
    return f"{len(ends)} streams ended with answer_interrupted; 4 other answers meanwhile; loaded and verified again"
