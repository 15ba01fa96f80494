"""`lorry up --serve vllm` with a real vLLM and a real model: the endpoint becomes ready, also after vLLM was killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from lorry import Lorry
from tests.lorry.cli.commands.test_up import up
from tests.lorry.local.test_local import until
from tests.services.programs import Missing
from tests.system.serving.vllm_server import vllm_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("service_database")]
PATIENCE_SECONDS = 600


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return vLLM's process for the service in the folder, and its descendants."""
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "vllm.entrypoints.openai.api_server" in (line := process.info["cmdline"] or [])
        and any(part.startswith(str(folder)) for part in line)
        and "--group" not in line
    ]
    return [*found, *(child for process in found for child in process.children(recursive=True))]


def test_vllm_is_verified_restarted_and_leaves_no_process(tmp_path: Path, real_gguf: Path) -> None:
    try:
        python = vllm_python()
    except Missing as missing:
        pytest.skip(f"needs vLLM: {missing}")
    data = tmp_path / "data"
    with up(data) as (process, _), Lorry(data_dir=data) as lorry:
        lorry.models.add("smollm2", str(real_gguf))
        lorry.models.wait("smollm2", timeout_seconds=PATIENCE_SECONDS)
        process.terminate()
        assert process.wait(60) == 0

    path = f"{os.environ['PATH']}:{python.parent}"
    with up(data, "--serve", "vllm", PATH=path, VLLM_CPU_KVCACHE_SPACE="1") as (process, _):
        with Lorry(data_dir=data) as lorry:
            until(lambda: lorry.serving.get("local").state == "ready", PATIENCE_SECONDS)
            verified = lorry.serving.get("local").verification or {}
            assert verified["passed"]

            first = processes_of(data)
            assert len(first) > 1
            os.kill(first[0].pid, signal.SIGKILL)
            until(lambda: lorry.serving.get("local").state == "unreachable", PATIENCE_SECONDS)
            until(lambda: lorry.serving.get("local").state == "ready", PATIENCE_SECONDS)
            assert not any(one.is_running() for one in first)

        second = processes_of(data)
        process.kill()
        until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in second))
