"""A hub of model repositories on loopback: as much of it as its client asks for."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub(BaseHTTPRequestHandler):
    """The parts of its HTTP interface that its client asks for."""

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


def hub_that_serves(folder: Path, commit: str, asked: list[str]):
    """One repository, org/model, with the files of `folder`; the paths that were asked for are added to `asked`."""

    class Serving(Hub):
        def do_GET(self):
            if self.path == "/api/agent-harnesses":  # asked for by the client of itself, in some environments
                self.answer(404)
                return
            kind, _, path = self.path.removeprefix("/api/models").removeprefix("/org/model/").partition("/")
            files = [file for file in folder.rglob("*") if file.is_file()]
            if kind == "revision":
                self.answer_json({"id": "org/model", "sha": commit, "siblings": [], "tags": [], "downloads": 0})
                return
            if kind == "tree":
                entry = {"type": "file", "oid": commit}
                self.answer_json(
                    [{**entry, "path": str(file.relative_to(folder)), "size": file.stat().st_size} for file in files]
                )
                return
            assert (kind, path.partition("/")[0]) == ("resolve", commit), self.path
            name = path.partition("/")[2]
            asked.append(name)
            content = (folder / name).read_bytes()
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

        do_HEAD = do_GET

    return serving(Serving)


def hub_that_refuses(answers):
    """answers: (status, X-Error-Code or None) by the name of a repository of `org`."""

    class Refusing(Hub):
        def do_GET(self):
            status, header = next(answer for name, answer in answers.items() if f"/org/{name}" in self.path)
            self.answer(status, **({"X_Error_Code": header} if header else {}))

        do_HEAD = do_GET

    return serving(Refusing)


@contextmanager
def serving(handler):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
