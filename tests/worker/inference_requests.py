"""Inference requests for a trainer, and the API process that waits for their answers."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from typing import Any

from catalog.inference import requests
from catalog.tables.inference import InferenceRequest
from tests.worker.pack_site import PackSite
from worker.protocol.mailbox import InboxReader
from worker.session.trainer_session import TrainerSession


class ApiProcess:
    """The receiving end of answers, as in an API process."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"secret@127.0.0.1:{self._server.getsockname()[1]}"
        self.token = b""
        self.lines: list[dict[str, Any]] = []
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with suppress(OSError):  # closed before a connection arrived
            self._connection, _ = self._server.accept()
            with self._connection, self._connection.makefile("rb") as lines:
                self.token = lines.readline()
                for line in lines:
                    self.lines.append(json.loads(line))

    def stop(self, request_id: str) -> None:
        assert self._connection is not None
        self._connection.sendall(json.dumps({"request_id": request_id}).encode() + b"\n")

    def types(self) -> list[str]:
        return [line["event"]["type"] for line in self.lines]

    def close(self) -> None:
        with suppress(OSError):  # a test has closed it
            self._server.shutdown(socket.SHUT_RDWR)
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._server.close()


def submit(
    site: PackSite,
    api: ApiProcess,
    *,
    name: str = "smol",
    adapter: str | None = None,
    project_id: str | None = None,
    **fields: Any,
) -> InferenceRequest:
    project_id = project_id or site.world.caller.project_id
    model = requests.resolve(site.db, project_id=project_id, name=name)
    body = {"messages": [], "model": name, **fields}
    row = requests.submit(site.db, project_id=project_id, model=model, body=body, reply_to=api.address)
    if adapter is not None:
        with site.db.write() as session:
            session.get_one(InferenceRequest, row.id).adapter = adapter
    return row


def claim_of(site: PackSite, row: InferenceRequest) -> str:
    """Return the id of the claim that holds the request."""
    with site.db.read() as session:
        claim_id = session.get_one(InferenceRequest, row.id).claim_id
    assert claim_id is not None
    return claim_id


def submit_and_claim(site: PackSite, session: TrainerSession, api: ApiProcess) -> tuple[InferenceRequest, str]:
    """Return a request that was handed to the trainer, and the id of its claim."""
    row = submit(site, api)
    answer(session)
    return row, claim_of(site, row)


def received(session: TrainerSession) -> list[tuple[str, dict[str, Any]]]:
    """Return the new messages for the trainer."""
    return [(message.verb, message.body) for message in InboxReader(session.directory).take()]


def answer(session: TrainerSession, *, was_notified: bool = True) -> list[tuple[str, dict[str, Any]]]:
    """Let the worker pass on requests. Returns the new messages for the trainer."""
    session.answer_requests(was_notified=was_notified)
    return received(session)
