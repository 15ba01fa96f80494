"""vLLM next to a local service: which base model and which address, with a scripted service."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path
from typing import Any, cast

import pytest

from lorry.cli import vllm
from lorry.cli.vllm import LocalVllm, Serve
from lorry.client import Lorry
from lorry.errors import LorryError, NotFound
from lorry.models import Model, ServingEndpoint
from tests.api.serving_engines import FakeVllm, serving
from tests.lorry.local.test_local import until


class FakeLorry:
    """A service with base models and at most one serving endpoint."""

    def __init__(self, *models: Model) -> None:
        self.models = self.serving = self
        self._models = models
        self.endpoint: ServingEndpoint | None = None
        self.reports: list[str | None] = []

    def list(self) -> list[Model]:
        return [*self._models]

    def get(self, name: str) -> Model | ServingEndpoint:
        if name == vllm.ENDPOINT:
            if self.endpoint is None:
                raise NotFound("There is none.", code="serving_endpoint_not_found", remedy="Add it.", status=404)
            return self.endpoint
        return next(model for model in self._models if model.id == name)

    def add(self, name: str, *, base_model: str, api_key: str, **given: Any) -> None:
        digest = next(model.digest for model in self._models if model.id == base_model)
        self.endpoint = ServingEndpoint(
            name=name, base_model=base_model, base_digest=str(digest), has_api_key=bool(api_key), **given
        )

    def report(self, name: str, *, error: str | None) -> None:
        self.reports.append(error)


def base(name: str, **changes: Any) -> Model:
    given = {"kind": "base", "state": "ready", "digest": f"digest-of-{name}", "local_path": f"/bases/{name}"}
    return Model(id=name, **{**given, **changes})


def register(folder: Path, service: FakeLorry, wanted: str | None = None) -> LocalVllm:
    server = LocalVllm(folder, Serve(program="/bin/vllm", base=wanted), devices=["cpu"])
    server.register(cast("Lorry", service), fail=print)
    return server


@pytest.mark.parametrize(
    ("devices", "visible", "option"),
    [
        (["cpu"], "", "--enforce-eager"),
        (["3"], "3", "--gpu-memory-utilization"),
        (["2", "0"], "2", "--gpu-memory-utilization"),
    ],
)
def test_server_sees_only_the_first_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: list[str], visible: str, option: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    program = tmp_path / "vllm"
    program.write_text(
        "#!/bin/sh\n"
        'printf "%s\\n" "$CUDA_VISIBLE_DEVICES" "$CUDA_DEVICE_ORDER" "$@" > started.part\n'
        "mv started.part started\nexec sleep 600\n"
    )
    program.chmod(0o755)
    (tmp_path / "logs").mkdir()
    server = LocalVllm(tmp_path, Serve(program=str(program), base=None), devices=devices)

    child = server.register(cast("Lorry", FakeLorry(base("smollm2"))), fail=print)
    child.start()
    try:
        until((tmp_path / "started").exists)
    finally:
        child.kill()
        child.wait()

    found, order, *arguments = (tmp_path / "started").read_text().splitlines()
    assert (found, order) == (visible, "PCI_BUS_ID")
    assert option in arguments


@pytest.mark.parametrize("wanted", ["", "llama.cpp", "vllm:", "vllm,smollm2"])
def test_invalid_value_is_rejected(wanted: str) -> None:
    with pytest.raises(LorryError, match="must be 'vllm' or 'vllm:BASE'") as refused:
        vllm.choose(wanted)
    assert refused.value.code == "invalid_settings"


def test_missing_program_names_the_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))

    with pytest.raises(LorryError) as refused:
        vllm.choose("vllm")

    assert refused.value.code == "not_installed"
    assert "pip install vllm" in refused.value.remedy


@pytest.mark.parametrize("place", ["path", "environment"])
def test_program_is_found_on_path_or_next_to_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "environment" / "python"))
    program = tmp_path / place / "vllm"
    program.parent.mkdir()
    program.touch(mode=0o755)

    assert vllm.choose("vllm:smollm2") == Serve(program=str(program), base="smollm2")


def test_key_is_stored_only_for_the_user_and_kept(tmp_path: Path) -> None:
    service = FakeLorry(base("smollm2"))

    register(tmp_path, service)
    kept = (tmp_path / vllm.FILE_NAME).read_text()
    register(tmp_path, service)

    assert stat.S_IMODE((tmp_path / vllm.FILE_NAME).stat().st_mode) == 0o600
    assert (tmp_path / vllm.FILE_NAME).read_text() == kept
    assert len(json.loads(kept)["api_key"]) > 30


def test_later_start_serves_the_base_model_of_the_endpoint(tmp_path: Path) -> None:
    service = FakeLorry(base("a"), base("b"))
    register(tmp_path, service, "b")

    assert register(tmp_path, service).base == "b"
    assert service.reports == [None], "the endpoint has no failure of an earlier start"


@pytest.mark.parametrize(
    ("models", "wanted", "code"),
    [
        ([], None, "not_configured"),
        ([base("a", state="importing")], None, "not_configured"),
        ([base("a"), base("b")], None, "ambiguous_id"),
        ([base("a", state="failed")], "a", "not_servable"),
        ([base("a", local_path=None)], "a", "not_servable"),
        ([base("ft:a", kind="adapter")], "ft:a", "not_servable"),
    ],
)
def test_unsuitable_base_model_is_a_clear_error(
    tmp_path: Path, models: list[Model], wanted: str | None, code: str
) -> None:
    service = FakeLorry(*models)

    with pytest.raises(LorryError) as refused:
        register(tmp_path, service, wanted)

    assert refused.value.code == code
    assert service.endpoint is None


@pytest.mark.parametrize("change", ["base", "digest", "file"])
def test_endpoint_that_does_not_fit_is_not_used(tmp_path: Path, change: str) -> None:
    service = FakeLorry(base("a"), base("b"))
    register(tmp_path, service, "a")
    if change == "digest":
        service._models = (base("a", digest="other"),)
    if change == "file":
        (tmp_path / vllm.FILE_NAME).write_text("{")

    with pytest.raises(LorryError) as refused:
        register(tmp_path, service, "b" if change == "base" else "a")

    assert refused.value.code == "already_exists"
    assert "lorry serving remove local" in refused.value.remedy


def test_port_of_the_endpoint_in_use_is_a_clear_error(tmp_path: Path) -> None:
    service = FakeLorry(base("a"))
    register(tmp_path, service)
    port = json.loads((tmp_path / vllm.FILE_NAME).read_text())["port"]

    with socket.create_server(("127.0.0.1", port)), pytest.raises(LorryError, match=f"Port {port}") as refused:
        register(tmp_path, service)

    assert refused.value.code == "port_in_use"


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("#!/env/bin/python3.11\nfrom vllm.entrypoints.cli.main import main\n", ["/env/bin/python3.11", "-m"]),
        ("#!/bin/sh\nexec other\n", ["vllm", "serve"]),
    ],
)
def test_script_of_the_package_is_run_by_its_interpreter(tmp_path: Path, script: str, command: list[str]) -> None:
    (tmp_path / "vllm").write_text(script)

    found = vllm._server_of(str(tmp_path / "vllm"))

    assert [Path(part).name if part.endswith("/vllm") else part for part in found[:2]] == command


@pytest.mark.parametrize(
    ("printed", "last", "remedy"),
    [
        ("Traceback\nImportError: no torch", "'ImportError: no torch'", "Fix the cause"),
        ("import torchaudio\nOSError: bad symbol", "'OSError: bad symbol'", "uninstall torchaudio torchcodec`"),
        ("", "''", "Fix the cause"),
    ],
)
def test_reason_of_a_server_that_can_not_start_has_its_last_line_and_its_log(
    tmp_path: Path, printed: str, last: str, remedy: str
) -> None:
    service, reasons = FakeLorry(base("smollm2")), list[str]()
    server = LocalVllm(tmp_path, Serve(program="/env/bin/vllm", base=None), devices=["cpu"])
    process = server.register(cast("Lorry", service), fail=reasons.append)
    server.log.parent.mkdir()
    server.log.write_text(f"{printed}\n\nThe process ended with status 1.\n")

    process.give_up()

    (reason,) = reasons
    assert f"{str(server.log)!r} ends with {last}." in reason
    assert remedy in reason


def test_server_is_ready_when_it_answers(tmp_path: Path) -> None:
    service = FakeLorry(base("smollm2"))
    server = LocalVllm(tmp_path, Serve(program="/env/bin/vllm", base=None), devices=["cpu"])
    process = server.register(cast("Lorry", service), fail=print)
    port = json.loads((tmp_path / vllm.FILE_NAME).read_text())["port"]

    assert not process.is_ready()
    with serving(FakeVllm(), port=port):
        assert process.is_ready()
