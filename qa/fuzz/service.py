"""The API server as a separate process, with a database that another process has filled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from catalog.settings import Settings
from tests.catalog.world import PEPPER

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(settings: Settings, log: Path) -> Iterator[str]:
    """Run the service during the block. Yields its URL. The log is written to `log`."""
    environment = {
        **os.environ,
        "LORRY_DATA_DIR": str(settings.data_dir),
        "LORRY_DATABASE_URL": settings.resolved_database_url(),
        "LORRY_PEPPER": PEPPER.current.decode(),
        "LORRY_STREAM_POLL_SECONDS": "0.05",
        "LORRY_SHUTDOWN_SECONDS": "2",
        "LORRY_REQUESTS_PER_MINUTE": "0",  # the fuzzer sends as fast as it can, also without a key
        "LORRY_PUBLIC_URL": "http://127.0.0.1",  # else /metrics is open to this machine
        "LORRY_WEBHOOK_ALLOWED_NETWORKS": "127.0.0.1/32",
        "LORRY_WEBHOOK_ALLOW_HTTP": "true",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "api", "--log-level", "warning", "serve", "--port", "0"]
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors) as child,
    ):
        assert child.stdout is not None
        try:
            url = json.loads(child.stdout.readline())["url"]
            # generated at the first request, which on a busy machine takes longer than schemathesis waits
            httpx.get(f"{url}/openapi.json", timeout=120, trust_env=False).raise_for_status()
            yield url
        finally:
            child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0, "the service did not exit with status 0"
