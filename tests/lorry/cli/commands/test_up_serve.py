"""`lorry up --serve vllm` with the real API server and worker, and a program `vllm` that answers like vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorry import Lorry
from lorry.errors import APIError
from tests import tiny_base
from tests.lorry.cli.commands.test_up import UP, up
from tests.lorry.local.test_local import is_alive, until

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("module_database")]
ROOT = Path(__file__).parents[4]
PROGRAM = f"""#!{sys.executable}
import json, os, signal, subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.api.serving_engines import FakeVllm, serving
helper = subprocess.Popen(["sleep", "600"])
with serving(FakeVllm(api_key=os.environ["VLLM_API_KEY"]), port=int(sys.argv[sys.argv.index("--port") + 1])):
    found = {{"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid(), "helper": helper.pid}}
    record = Path(__file__).with_name("started.json")
    record.with_suffix(".part").write_text(json.dumps(found))
    record.with_suffix(".part").replace(record)
    signal.pause()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, the data of the service, and `bin`, with the program. The tests run in order."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "bin").mkdir()
    program = folder / "bin" / "vllm"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    return folder


def path_of(folder: Path) -> str:
    return f"{folder / 'bin'}:{os.environ['PATH']}"


def wait_for_program(folder: Path, *, other_than: int = 0) -> dict[str, Any]:
    """Wait until the program has started. other_than: the id of its earlier process."""
    record = folder / "bin" / "started.json"
    until(lambda: record.exists() and json.loads(record.read_text())["pid"] != other_than)
    return json.loads(record.read_text())


@pytest.mark.parametrize(("serve", "printed"), [("vllm", "lorry models add NAME SOURCE"), ("vllm:other", "'other'")])
def test_missing_base_model_stops_the_start_with_a_clear_error(folder: Path, serve: str, printed: str) -> None:
    argv = [*UP, "--data-dir", str(folder / "data"), "--serve", serve]
    env = {**os.environ, "PATH": path_of(folder)}

    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120, env=env)

    assert done.returncode == 1
    assert printed in done.stderr
    assert "Traceback" not in done.stderr
    assert APIError.__name__ not in done.stderr


def test_only_base_model_is_served_registered_and_supervised(folder: Path) -> None:
    data = folder / "data"
    with up(data) as (process, _), Lorry(data_dir=data) as lorry:
        lorry.models.add("tiny", str(tiny_base.make(folder / "base")))
        lorry.models.wait("tiny", timeout_seconds=300)
        process.terminate()
        assert process.wait(60) == 0

    with up(data, "--serve", "vllm", PATH=path_of(folder), LORRY_LEASE_SECONDS="60") as (process, printed):
        assert printed["served_base_model"] == "tiny"
        first = wait_for_program(folder)
        with Lorry(data_dir=data) as lorry:
            endpoint = lorry.serving.get("local")
            model = lorry.models.get("tiny")
            options = first["argv"]
            assert options[:2] == ["serve", model.local_path]
            assert endpoint.url == f"http://127.0.0.1:{options[options.index('--port') + 1]}"
            assert endpoint.max_rank == int(options[options.index("--max-lora-rank") + 1])
            assert options[options.index("--host") + 1] == "127.0.0.1"
            assert options[options.index("--dtype") + 1] == "float32"
            assert first["env"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
            assert first["env"]["VLLM_API_KEY"] not in " ".join(options)
            assert not [name for name in first["env"] if name.startswith("LORRY_")]
            # it answers, with the key, but not like the base model
            until(lambda: lorry.serving.get("local").state == "rejected", seconds=300)
            assert "Lorry as" in (lorry.serving.get("local").last_error or "")

        os.kill(first["pid"], signal.SIGKILL)
        second = wait_for_program(folder, other_than=first["pid"])
        assert second["argv"] == first["argv"]
        until(lambda: not is_alive(first["helper"]))
        process.terminate()
        assert process.wait(60) == 0
        assert not is_alive(second["pid"])
        until(lambda: not is_alive(second["helper"]))
    assert "The vLLM server ended" in (folder / "stderr.txt").read_text()


def test_later_start_keeps_the_endpoint_and_a_killed_parent_leaves_nothing(folder: Path) -> None:
    before = wait_for_program(folder)

    with up(folder / "data", "--serve", "vllm:tiny", PATH=path_of(folder)) as (process, _):
        found = wait_for_program(folder, other_than=before["pid"])
        assert found["argv"] == before["argv"]
        assert found["env"]["VLLM_API_KEY"] == before["env"]["VLLM_API_KEY"]
        process.kill()
        until(lambda: not is_alive(found["pid"]) and not is_alive(found["helper"]))


def test_server_that_can_not_start_is_given_up_and_shown_in_its_endpoint(folder: Path) -> None:
    program = folder / "bin" / "vllm"
    program.write_text(f"#!{sys.executable}\nimport torchaudio_that_is_missing\n")
    earlier = (folder / "stderr.txt").read_text()
    with up(folder / "data", "--serve", "vllm", PATH=path_of(folder)) as (process, _):
        with Lorry(data_dir=folder / "data") as lorry:
            until(lambda: lorry.serving.get("local").state == "failed", seconds=300)
            (listed,) = lorry.serving.list()
        process.terminate()
        assert process.wait(60) == 0

    assert listed.last_error is not None
    assert "ends with \"ModuleNotFoundError: No module named 'torchaudio_that_is_missing'\"" in listed.last_error
    assert "uninstall torchaudio torchcodec" in listed.last_error
    messages = (folder / "stderr.txt").read_text().removeprefix(earlier)
    assert messages.count("The vLLM server ended") == 2
    assert listed.last_error in messages
    assert "Traceback" not in messages

    program.write_text(PROGRAM)
    with up(folder / "data", "--serve", "vllm", PATH=path_of(folder)), Lorry(data_dir=folder / "data") as lorry:
        assert lorry.serving.get("local").state != "failed"
