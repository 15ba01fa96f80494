"""A hub of model repositories on loopback that serves what its client requests, and a process that imports from it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

IMPORTS = textwrap.dedent("""
    import json
    import sys
    from pathlib import Path
    from lora_core.model_files.import_base import import_base
    from lora_core.errors import LoraCoreError
    for line in sys.stdin:
        folder, names = json.loads(line)
        results = []
        for name in names:
            try:
                target = Path(folder) / "base"
                imported = import_base(source=f"org/{name}", kind="hub", revision="main", target_dir=target)
                results.append(f"{imported.commit} {imported.license}")
            except LoraCoreError as error:
                results.append(f"{error} {error.remedy}")
        print("results", json.dumps(results), flush=True)
""")


class Importer:
    """Imports base models from hubs in one child process.

    The hub's client reads the hub's address when Python imports the client, which takes seconds. So all hubs use one
    address, one after the other.
    """

    def __init__(self, folder: Path) -> None:
        """folder: contains the cache of the hub's client."""
        self._cache = folder / "hub"
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{self._server.server_port}"
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(self._cache), "HF_HUB_OFFLINE": "0"}
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-c", IMPORTS],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def import_from(self, hub: type["Hub"], folder: Path, *names: str) -> list[str]:
        """Import each org/NAME at main into `folder`/base. Return commit and license, or the error, of each.

        The client caches the files of a commit within a call, so pass each name only once.
        """
        self._server.RequestHandlerClass = hub
        shutil.rmtree(self._cache, ignore_errors=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(folder), names]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("results "):
                return json.loads(line.removeprefix("results "))
        raise AssertionError(self.output())

    def output(self) -> str:
        """Return the process's output apart from its answers."""
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(60)
        self._log.close()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def importer(folder: Path) -> Generator[Importer]:
    opened = Importer(folder)
    try:
        yield opened
    finally:
        opened.close()


class Hub(BaseHTTPRequestHandler):
    """Request handler with helpers for the responses of a hub."""

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def log_message(self, format, *args):  # noqa: A002
        pass


def hub_that_serves(folder: Path, commit: str, requested: list[str], *, repository: str = "org/model") -> type[Hub]:
    """Serve one repository with the files of `folder`. Requested paths are appended to `requested`."""

    class Serving(Hub):
        def do_GET(self):
            if self.path == "/api/agent-harnesses":  # the client requests it unprompted in some environments
                self.answer(404)
                return
            kind, _, path = self.path.removeprefix("/api/models").removeprefix(f"/{repository}/").partition("/")
            files = [file for file in folder.rglob("*") if file.is_file()]
            if kind == "revision" or self.path == f"/api/models/{repository}":
                self.answer_json({"id": repository, "sha": commit, "siblings": [], "tags": [], "downloads": 0})
                return
            if kind == "tree":
                entry = {"type": "file", "oid": commit}
                self.answer_json(
                    [{**entry, "path": str(file.relative_to(folder)), "size": file.stat().st_size} for file in files]
                )
                return
            assert (kind, path.partition("/")[0]) == ("resolve", commit), self.path
            name = path.partition("/")[2]
            requested.append(name)
            content = (folder / name).read_bytes()
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

        do_HEAD = do_GET

    return Serving


def hub_that_refuses(answers) -> type[Hub]:
    """answers: (status, X-Error-Code or None) by the name of a repository of `org`."""

    class Refusing(Hub):
        def do_GET(self):
            status, header = next(answer for name, answer in answers.items() if f"/org/{name}" in self.path)
            self.answer(status, **({"X_Error_Code": header} if header else {}))

        do_HEAD = do_GET

    return Refusing
