"""Requests to vLLM: their bodies, waits for a free connection, and certificates."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.inference import vllm_client
from api.inference.vllm_client import EndpointFailure, ServerAddress, VllmClient, request_of
from catalog.serving.probes import GenerationSettings, probe_body
from tests.api.serving_engines import FakeVllm
from tests.api.webhooks.test_http_sender import certificates

SETTINGS = GenerationSettings(end_ids=(2,), template_kwargs={})


def body_of(**changes: Any) -> dict[str, Any]:
    return request_of({**probe_body("chat"), **changes}, served_model="m", settings=SETTINGS)[1]


def test_message_of_a_developer_is_one_of_the_system_as_in_the_built_in_engine() -> None:
    messages = [{"role": role, "content": role} for role in ("system", "developer", "user")]

    sent = body_of(messages=messages)["messages"]

    assert [(message["role"], message["content"]) for message in sent] == [
        ("system", "system"),
        ("system", "developer"),
        ("user", "user"),
    ]


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_every_seed_is_one_in_vllm(seed: int) -> None:
    """vLLM takes -1 for no seed, and stores the sum of seed and choice in 64 bits."""
    assert 0 <= body_of(seed=seed)["seed"] < 2**63 - 16


def test_small_seed_is_unchanged() -> None:
    assert body_of(seed=7)["seed"] == 7


def test_template_without_a_date_gets_no_variables() -> None:
    assert "chat_template_kwargs" not in body_of()


def test_request_does_not_wait_long_for_the_connections_of_others(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_client, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(vllm_client, "CONNECT_SECONDS", 2.0)
    vllm.holds = "/v1/chat/completions"
    server = ServerAddress(url=vllm.url, api_key=None)

    async def answered(client: VllmClient) -> None:
        async with client.answering(server, "/v1/chat/completions", body_of()):
            pass

    async def act() -> str:
        client = VllmClient()
        held = asyncio.create_task(answered(client))
        while not vllm.requests:
            await asyncio.sleep(0.01)
        try:
            async with asyncio.timeout(60):
                with pytest.raises(EndpointFailure) as raised:
                    await answered(client)
        finally:
            held.cancel()
            await asyncio.gather(held, return_exceptions=True)
            await client.close()
        assert raised.value.kind == "refused"
        return raised.value.message

    assert "too many requests are open" in asyncio.run(act())


def test_certificate_of_a_private_authority_is_trusted_if_ssl_cert_file_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, _ = certificates(tmp_path, "localhost")

    async def listed() -> list[Any]:
        client = VllmClient()
        try:
            return await client.models(ServerAddress(url=url, api_key=None))
        finally:
            await client.close()

    with https(context) as url:
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        with pytest.raises(EndpointFailure, match="CERTIFICATE_VERIFY_FAILED"):
            asyncio.run(listed())
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "both.pem"))
        assert asyncio.run(listed()) == []


class NoModels(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = b'{"data": []}'
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that reject the certificate."""


@contextmanager
def https(context: ssl.SSLContext) -> Iterator[str]:
    """Run a server that lists no models. Yields its address."""
    server = QuietServer(("127.0.0.1", 0), NoModels)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"https://localhost:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Parts(httpx.AsyncByteStream):
    """The body of a response in parts of `size` bytes."""

    def __init__(self, content: bytes, size: int) -> None:
        self._parts = [content[start : start + size] for start in range(0, len(content), size)]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_chunks_are_complete_however_the_network_divides_them(size: int) -> None:
    content = b'data: {"a": 1}\n\ndata:{"b": 2}\r\n\n: comment\n\ndata: [DONE]\n\ndata: {"c": 3}\n\n'

    async def received() -> list[dict[str, Any]]:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Parts(content, size)))
        client = VllmClient(transport=transport)
        try:
            async with client.answering(ServerAddress(url="http://vllm", api_key=None), "/v1", {}) as chunks:
                return [chunk async for chunk in chunks]
        finally:
            await client.close()

    assert asyncio.run(received()) == [{"a": 1}, {"b": 2}]
