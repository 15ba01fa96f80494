"""`Lorry`: the client of one service, with one attribute per resource."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from lorry import connection
from lorry.resources.adapters import Adapters
from lorry.resources.audit import Audit
from lorry.resources.batches import Batches
from lorry.resources.chat import Chat
from lorry.resources.files import Files
from lorry.resources.jobs import Jobs
from lorry.resources.keys import Keys, Projects
from lorry.resources.models import Models
from lorry.resources.organizations import Organizations
from lorry.resources.plans import Plans
from lorry.resources.queue import Queue, Workers
from lorry.resources.serving import Serving
from lorry.resources.sign_in import SignInLinks
from lorry.resources.sweeps import Sweeps
from lorry.resources.usage import Usage
from lorry.resources.webhooks import Webhooks
from lorry.transport.http import Transport
from lorry.transport.retries import RetryPolicy


class Lorry:
    """Client of a service. By default it reads the address and API key of a local service from the connection file;
    LORRY_URL and LORRY_API_KEY, or the arguments, override them.

    `sleep` and `transport` are for tests and for custom event loops.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        data_dir: Path | str | None = None,
        retries: RetryPolicy | None = None,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        found = connection.find(url=url, api_key=api_key, data_dir=None if data_dir is None else Path(data_dir))
        self._transport = Transport(found, retries=retries, sleep=sleep, transport=transport)
        self.files = Files(self._transport)
        self.batches = Batches(self._transport)
        self.jobs = Jobs(self._transport)
        self.plans = Plans(self._transport)
        self.sweeps = Sweeps(self._transport)
        self.adapters = Adapters(self._transport)
        self.models = Models(self._transport)
        self.chat = Chat(self._transport)
        self.queue = Queue(self._transport)
        self.workers = Workers(self._transport)
        self.keys = Keys(self._transport)
        self.organizations = Organizations(self._transport)
        self.projects = Projects(self._transport)
        self.usage = Usage(self._transport)
        self.audit = Audit(self._transport)
        self.webhooks = Webhooks(self._transport)
        self.serving = Serving(self._transport)
        self.sign_in_links = SignInLinks(self._transport)

    @property
    def url(self) -> str:
        """The address without `/v1`."""
        return self._transport.connection.url

    @property
    def api_key(self) -> str | None:
        return self._transport.connection.api_key

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
