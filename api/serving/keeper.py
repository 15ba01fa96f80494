"""Keeps serving endpoints in step with their deployments: loads, verifies and unloads adapters.

One API process at a time holds an endpoint's lease. It compares the models that the server lists with the deployments
every few seconds, so it makes no difference whether Lorry or the server was restarted. Adapters are loaded and verified
in tasks of their own, because the built-in engine may need minutes for a reference answer. Another task renews the
lease meanwhile. When the lease is lost, all of them end.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from api.background.task_loop import TaskLoop
from api.inference.vllm_client import EndpointFailure, ServedModel, ServerAddress, VllmClient
from api.serving import adapter_files, reconciliation
from api.serving.held_lease import HeldLease, LeaseLost
from api.serving.reconciliation import Actions, diff
from api.serving.reference_answers import ReferenceAnswers
from catalog.db.database import Database
from catalog.errors import LorryError, StaleClaim
from catalog.pepper import Pepper
from catalog.serving import endpoints, keeping, probes
from catalog.serving.keeping import EndpointWork, WantedAdapter
from catalog.serving.probes import ProbeAnswer
from catalog.storage.manifest import Manifest
from catalog.storage.store import ArtifactStore
from catalog.tables.serving import ServingEndpoint
from catalog.tables.table import Json
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim, TaskKind

LOOK_SECONDS = 5.0
"""Interval between two checks of a server."""
NOTE_SECONDS = 20.0
"""Interval at which an unchanged state is written."""
REJECTED_SECONDS = 30.0
"""Wait after a failed verification of the base model."""
NOT_ANSWERED = "The server has not answered yet. It may still be starting."
MAX_KEPT = 100
"""Maximum number of endpoints that one process keeps."""
MAX_NAMED = 20
"""Maximum number of adapters of others that a log line names."""
MAX_LOADING = 4
"""Maximum number of adapters of one endpoint that are loaded and verified at the same time."""
T = TypeVar("T")
log = logging.getLogger("lorry.api")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeeperTools:
    """The services that the tasks of an endpoint use."""

    db: Database
    store: ArtifactStore
    client: VllmClient
    references: ReferenceAnswers
    pepper: Pepper


class EndpointKeepers(TaskLoop["EndpointKeeper"]):
    """The endpoints that this process keeps."""

    def __init__(self, tools: KeeperTools) -> None:
        super().__init__("serving")
        self._tools = tools

    @property
    def most(self) -> int:
        return MAX_KEPT

    @property
    def look_seconds(self) -> float:
        return LOOK_SECONDS

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            await self._tools.client.close()

    def on_wake(self) -> None:
        """A deployment or an endpoint has changed."""
        super().on_wake()
        for keeper in self.claims:
            keeper.wake()

    async def claim(self) -> EndpointKeeper | None:
        lease = {"lease_seconds": keeping.ENDPOINT_LEASE_SECONDS}
        claim = await run_in_threadpool(partial(task_queue.claim, self._tools.db, [TaskKind.ENDPOINT], **lease))
        return None if claim is None else EndpointKeeper(self._tools, claim)

    async def work(self, claimed: EndpointKeeper) -> None:
        await claimed.run()


class EndpointKeeper:
    """One endpoint while this process holds its lease."""

    def __init__(self, tools: KeeperTools, claim: TaskClaim) -> None:
        self.claim = claim
        self._tools = tools
        self._wake_up = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """Running tasks: by deployment, and the verification of the base model by the endpoint's id."""
        self._loading = asyncio.Semaphore(MAX_LOADING)
        self._lease = HeldLease(partial(self._do, task_queue.renew, lease_seconds=keeping.ENDPOINT_LEASE_SECONDS))
        self._foreign: list[str] = []
        """Adapters on the server that this service has not loaded, as reported last."""
        self._noted_at = self._verify_at = -math.inf
        """When the state was written, and when the base model may be verified again, by the monotonic clock."""
        self._has_answered = False
        """Whether the server has answered this process."""

    def wake(self) -> None:
        self._wake_up.set()

    async def run(self) -> None:
        """Keep the endpoint until its lease is lost or it is removed."""
        checking, renewing = asyncio.create_task(self._check_often()), asyncio.create_task(self._lease.keep())
        try:
            done, _ = await asyncio.wait((checking, renewing), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except LeaseLost:
            log.warning("serving endpoint=%s the lease is lost", self.claim.subject)
        finally:
            for tasks in ([checking, *self._tasks.values()], [renewing]):  # the lease is renewed until the others end
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            self._lease.end()  # a cancelled task leaves its thread running
            with suppress(LorryError, StaleClaim):
                await asyncio.shield(run_in_threadpool(task_queue.release, self._tools.db, self.claim))

    async def _check_often(self) -> None:
        while await self._check():
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake_up.wait()
            self._wake_up.clear()

    async def _check(self) -> bool:
        """Compare the server with its deployments once. Returns False if the endpoint was removed. Raises LeaseLost."""
        running = frozenset(self._tasks)
        try:
            work = await self._do(keeping.read)
            if work is None:
                raise LeaseLost
            if work.is_removed:
                await self._remove(work)
                return False
            await self._compare(work, running)
        except LorryError as error:
            log.warning("serving endpoint=%s code=%s", self.claim.subject, error.code)
        return True

    async def _compare(self, work: EndpointWork, running: frozenset[str]) -> None:
        """running: names of the tasks that ran when `work` was read. Their outcomes may not be part of it."""
        row = work.endpoint
        try:
            server = self._address(row)
            models = await self._tools.client.models(server)
            self._has_answered = True
            base = _base_of(models)
        except EndpointFailure as failure:
            self._verify_at = -math.inf
            if failure.kind == "unreachable":
                await self._silent(row, failure)
            else:
                await self._unusable(row, state="rejected", error=failure.message)
            return await self._clean_up(diff([], work))
        except LorryError as error:
            return await self._unusable(row, state="rejected", error=error.sentence())
        actions = diff(models, work)
        self._log_foreign(row, actions.foreign)
        await self._unload_unwanted(server, actions)
        await self._clean_up(actions)
        if row.state != "ready" or (row.served_model, row.served_root) != (base.name, base.root):
            if time.monotonic() >= self._verify_at and row.id not in running:
                self._begin(row.id, self._verify_base(work, server, base))
            return None
        if time.monotonic() - self._noted_at > NOTE_SECONDS:
            await self._do(keeping.note_reachable, served_model=base.name, served_root=base.root)
            self._noted_at = time.monotonic()
        if actions.missing:
            await self._do(keeping.note_missing, actions.missing)
        for one, loaded in actions.load:
            if one.deployment_id not in running:
                self._begin(one.deployment_id, self._deploy(work, server, one, loaded))
        return None

    async def _unload_unwanted(self, server: ServerAddress, actions: Actions) -> None:
        for name in actions.unload:
            await self._lease.check()
            try:
                await self._tools.client.unload(server, name=name)
            except EndpointFailure as failure:  # tried again at the next check
                log.warning("serving endpoint=%s unload: %s", self.claim.subject, failure.message)
            else:
                self.wake()  # the next check deletes its deployment and files

    def _log_foreign(self, row: ServingEndpoint, foreign: list[str]) -> None:
        """Log the adapters that this service has not loaded and leaves alone, if they have changed."""
        if foreign != self._foreign:
            names = ", ".join(foreign[:MAX_NAMED]) + (", …" if len(foreign) > MAX_NAMED else "") or "none"
            log.info("serving endpoint=%s adapters that this service has not loaded: %s", row.id, names)
            self._foreign = foreign

    async def _clean_up(self, actions: Actions) -> None:
        """Delete deployments that are not wanted and not loaded any more, and files that none needs."""
        for deployment_id in actions.forget:
            task = self._tasks.pop(deployment_id, None)
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if actions.kept_files is not None:
            await self._lease.check()
            await self._remove_others(actions.folder, actions.kept_files)
        if actions.forget:
            await self._do(keeping.forget, actions.forget)

    async def _remove(self, work: EndpointWork) -> None:
        """Unload all adapters of a removed endpoint, if its server answers, and delete the endpoint."""
        row = work.endpoint
        actions = diff([], work)
        try:
            server = self._address(row)
            actions = diff(await self._tools.client.models(server), work)
            await self._unload_unwanted(server, actions)
        except (EndpointFailure, LorryError):
            log.warning("serving endpoint=%s was removed without unloading its adapters", row.id)
        await self._lease.check()
        await self._remove_others(actions.folder, set())
        await self._do(keeping.forget_endpoint)

    async def _verify_base(self, work: EndpointWork, server: ServerAddress, base: ServedModel) -> None:
        """Compare the server's answer of the base model with the reference, which is computed first if necessary."""
        row = work.endpoint
        try:
            reference = row.reference
            if reference is None:
                reference = await self._tools.references.of_base(row.base_model, project_id=row.project_id)
                await self._do(keeping.store_reference, deployment_id=None, reference=reference)
            found = await self._probe(server, base.name, reference)
        except EndpointFailure as failure:
            state = "unreachable" if failure.kind == "unreachable" else "rejected"
            return await self._unusable(row, state=state, error=failure.message)
        except LorryError as error:
            reason = f"The built-in engine can't compute the reference answer. {error.sentence()}"
            return await self._unusable(row, state="pending", error=reason)
        verdict = probes.judge_base(probes.answer_of(reference), found)
        if not verdict["passed"]:
            error = probes.why_failed(verdict, subject=f"base model {row.base_model!r}")
            self._verify_at = time.monotonic() + REJECTED_SECONDS
            return await self._unusable(row, state="rejected", error=error, verification=verdict)
        await self._do(keeping.note_reachable, served_model=base.name, served_root=base.root, verification=verdict)
        return self.wake()

    async def _deploy(
        self, work: EndpointWork, server: ServerAddress, one: WantedAdapter, loaded: ServedModel | None
    ) -> None:
        """Load an adapter and verify it. Each failure is recorded with the deployment, and tried again later."""
        async with self._loading:
            try:
                verdict = await self._load(work, server, one, loaded)
            except EndpointFailure as failure:
                state = "pending" if failure.kind == "unreachable" else "failed"
                shown = _shown_to_projects(work.endpoint.name, failure)
                return await self._failed(one, state=state, error=shown, operator_error=failure.message)
            except LorryError as error:
                return await self._failed(one, state="pending", error=error.sentence())
            if not verdict["passed"]:
                error = probes.why_failed(verdict, subject=f"adapter {one.name!r}")
                await self._unload(server, one)  # first: the next attempt must not find it loaded
                return await self._failed(one, state="failed", error=error, verification=verdict)
            if not await self._do(keeping.note_loaded, one.deployment_id, verification=verdict):
                await self._unload(server, one)
            return None

    async def _load(
        self, work: EndpointWork, server: ServerAddress, one: WantedAdapter, loaded: ServedModel | None
    ) -> Json:
        """Return the verification of the adapter, which is loaded then."""
        assert one.manifest is not None, "only adapters with files are loaded"
        row, kind = work.endpoint, (work.endpoint.reference or {})["kind"]
        reference = one.reference
        if reference is None:
            reference = await self._tools.references.of(one.name, kind, project_id=one.project_id)
            await self._do(keeping.store_reference, deployment_id=one.deployment_id, reference=reference)
        path = reconciliation.adapter_path(work, one)
        if loaded is not None and loaded.root != str(path):
            raise EndpointFailure(
                f"The server has loaded another adapter under the name {one.name!r}, from {loaded.root!r}. Unload it, "
                "or remove it from --lora-modules.",
                kind="refused",
            )
        if loaded is None:
            await self._lease.check()
            await self._put(path, one.manifest)
            await self._lease.check()
            await self._tools.client.load(server, name=one.name, path=str(path))
        found = await self._probe(server, one.name, row.reference or {})
        return probes.judge_adapter(
            probes.answer_of(reference),
            found,
            of_base=probes.answer_of(row.reference or {}),
            base_diff=(row.verification or {})["max_diff"],
        )

    async def _probe(self, server: ServerAddress, model: str, of_base: Json) -> ProbeAnswer:
        """Let a model of the server answer the probe. of_base: the reference of the base model. Raises
        EndpointFailure."""
        settings = probes.settings_of(of_base, of_base["kind"])
        assert settings is not None, "a reference has the settings for its kind of request"
        return await self._tools.client.probe(server, model=model, kind=of_base["kind"], settings=settings)

    async def _put(self, path: Path, manifest: Manifest) -> None:
        """Write the adapter's files. Raises EndpointFailure."""
        has_ended = False

        def check() -> None:
            self._lease.check_now()
            if has_ended:  # the task was cancelled, but its thread continues
                raise LeaseLost

        try:
            await run_in_threadpool(partial(adapter_files.put, self._tools.store, path, manifest, check=check))
        except (OSError, LorryError) as error:
            reason = error.sentence() if isinstance(error, LorryError) else f"{error}."
            text = f"The adapter's files can't be written to {str(path)!r}. {reason}"
            raise EndpointFailure(text, kind="refused") from error
        finally:
            has_ended = True

    async def _remove_others(self, folder: Path, kept: set[str]) -> None:
        try:
            await run_in_threadpool(partial(adapter_files.remove_others, folder, kept, check=self._lease.check_now))
        except OSError as error:  # the files stay, and deployments continue
            log.warning("serving endpoint=%s files in %s can't be removed: %s", self.claim.subject, folder, error)

    async def _unload(self, server: ServerAddress, one: WantedAdapter) -> None:
        await self._lease.check()
        with suppress(EndpointFailure):  # a later check or attempt finds it loaded
            await self._tools.client.unload(server, name=one.name)

    async def _failed(
        self,
        one: WantedAdapter,
        *,
        state: str,
        error: str,
        operator_error: str | None = None,
        verification: Json | None = None,
    ) -> None:
        """Record a failure. error: shown to the project. operator_error: None: operators see the same."""
        log.warning("serving deployment=%s state=%s: %s", one.deployment_id, state, operator_error or error)
        found = {"state": state, "error": error, "operator_error": operator_error, "verification": verification}
        await self._do(keeping.note_failed, one.deployment_id, **found)

    async def _silent(self, row: ServingEndpoint, failure: EndpointFailure) -> None:
        """Record that the server does not answer. Until its first answer, it may still be starting."""
        if row.state == "failed":
            return
        is_new = row.state == "pending" and row.served_model is None and not self._has_answered
        error = f"{NOT_ANSWERED} {failure.message}" if is_new else failure.message
        await self._unusable(row, state="pending" if is_new else "unreachable", error=error, is_silent=True)

    async def _unusable(
        self,
        row: ServingEndpoint,
        *,
        state: str,
        error: str,
        verification: Json | None = None,
        is_silent: bool = False,
    ) -> None:
        """is_silent: the server did not answer."""
        if (row.state, row.last_error) != (state, error):
            log.warning("serving endpoint=%s state=%s: %s", row.id, state, error)
        elif time.monotonic() - self._noted_at < NOTE_SECONDS:
            return
        self._noted_at = time.monotonic()
        found = {"state": state, "error": error, "verification": verification, "is_silent": is_silent}
        await self._do(keeping.note_unusable, **found)

    def _address(self, row: ServingEndpoint) -> ServerAddress:
        return ServerAddress(url=row.url, api_key=endpoints.api_key(row, peppers=self._tools.pepper.all()))

    def _begin(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task, unless one of this name is running."""
        if name in self._tasks:
            work.close()
            return
        task = self._tasks[name] = asyncio.create_task(self._guarded(name, work))
        task.add_done_callback(lambda _: self._tasks.pop(name, None) if self._tasks.get(name) is task else None)

    async def _guarded(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except LeaseLost:
            self.wake()  # the next check ends
        except LorryError as error:  # such as a database that does not answer; the next check begins again
            log.warning("serving endpoint=%s code=%s", self.claim.subject, error.code)
        except Exception:
            log.exception("crash in serving endpoint=%s task=%s", self.claim.subject, name)

    async def _do(self, act: Callable[..., T], *args: Any, **given: Any) -> T:
        """Run a function of catalog.serving.keeping in a thread, in the name of the claim."""
        return await run_in_threadpool(partial(act, self._tools.db, self.claim, *args, **given))


def _shown_to_projects(endpoint: str, failure: EndpointFailure) -> str:
    """Return the failure without the server's text, which may contain paths and addresses of the operator."""
    if failure.kind == "unreachable":
        return f"Endpoint {endpoint!r} does not respond. The adapter is loaded when the endpoint responds again."
    return (
        f"Endpoint {endpoint!r} did not load the adapter, or did not answer with it. Ask an operator for the reason, "
        f"which `lorry serving deployments {endpoint}` shows."
    )


def _base_of(models: list[ServedModel]) -> ServedModel:
    """Return the base model that the server lists. Raises EndpointFailure."""
    base = next((model for model in models if model.parent is None), None)
    if base is None:
        raise EndpointFailure("GET /v1/models lists no base model.", kind="refused")
    return base
