"""The fault proxy fails on demand only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tests.services.fault_proxy import FaultProxy, fault_proxy, http_answer

BODY = b"x" * 50_000


class Kept(BaseHTTPRequestHandler):
    """Counts the bodies that arrived completely."""

    whole: list[int]

    def do_PUT(self) -> None:
        self.whole.append(len(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@contextmanager
def proxied() -> Iterator[tuple[FaultProxy, httpx.Client, list[int]]]:
    whole: list[int] = []
    handler = type("Handler", (Kept,), {"whole": whole})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with fault_proxy("127.0.0.1", server.server_port) as proxy, _client(proxy) as client:
            yield proxy, client, whole
        server.shutdown()
        thread.join()


def _client(proxy: FaultProxy) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{proxy.port}", trust_env=False, timeout=20)


def test_everything_passes_by_default() -> None:
    with proxied() as (_, client, whole):
        assert client.put("/a", content=BODY).status_code == 200
        assert client.put("/a", content=BODY).status_code == 200
    assert whole == [len(BODY)] * 2


def test_proxy_can_answer_in_place_of_the_server() -> None:
    with proxied() as (proxy, client, whole):
        proxy.judge = lambda request: http_answer("500 Broken", "<no/>") if request.path == "/a" else "pass"

        assert client.put("/a", content=BODY).status_code == 500
        assert client.put("/b", content=BODY).status_code == 200
    assert whole == [len(BODY)]


def test_response_is_lost_although_the_server_handled_the_request() -> None:
    with proxied() as (proxy, client, whole):
        proxy.judge = lambda _: "lose the answer"

        with pytest.raises(httpx.RemoteProtocolError):
            client.put("/a", content=BODY)
    assert whole == [len(BODY)]


def test_partition_holds_traffic_until_it_heals() -> None:
    with proxied() as (proxy, client, whole):
        proxy.part()
        with pytest.raises(httpx.ReadTimeout):
            client.put("/a", content=BODY, timeout=0.5)
        assert whole == []

        proxy.heal()

        assert client.put("/a", content=BODY).status_code == 200


def test_refused_client_is_accepted_after_healing() -> None:
    with proxied() as (proxy, client, whole):
        proxy.refuse()
        with pytest.raises(httpx.TransportError):
            client.put("/a", content=BODY)

        proxy.heal()

        assert client.put("/a", content=BODY).status_code == 200
    assert whole == [len(BODY)]
