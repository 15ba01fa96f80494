"""Heartbeats of a worker while another process floods SQLite with sweeps whose patterns are slow, but allowed.

One process creates sweeps from several threads without a pause, as an API server under attack does, and advances them.
The measuring process renews one claim. The longest delay of a heartbeat must stay below a third of a lease.
"""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from typing import Any

from benchmarks.api.plan import ApiPlan
from benchmarks.api.service import place, servers
from benchmarks.results import Result
from catalog.db.database import Database
from catalog.errors import LorryError, Unavailable
from catalog.queue import claims
from catalog.search.spec import SweepRequest
from catalog.spec import target_modules
from catalog.spec.lora import LoraRequest, resolve_lora
from catalog.sweeps import controller, creation
from catalog.tenancy.authentication import Caller
from tests.catalog.world import LEASE

THREADS = 4
TRIALS = 60
BEAT_SECONDS = 0.5
PATTERN_SECONDS = 0.5 * target_modules.MATCH_SECONDS
"""Target cost of the patterns of one job; submission rejects patterns that take longer than MATCH_SECONDS."""
LAYERS = list(range(32))
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NAMES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DESCRIPTION = {
    "linear_paths": [{"path": f"model.layers.*.{name}", "shape": [64, 64], "layers": LAYERS} for name in NAMES]
}


def run(plan: ApiPlan) -> Result:
    result = Result(theme="api_heartbeats", settings=plan.settings() | {"threads": THREADS, "trials": TRIALS})
    with servers(("sqlite",)) as server, place("sqlite", server, plan.folder, "heartbeats") as where:
        with where.world() as world:
            world.base("wide", **DESCRIPTION)
            claim_id = world.running().claim_id
        given = {"caller": world.caller, "file_id": world.file_id}
        report = _flood_and_beat(where.url, claim_id, given, seconds=plan.flood_seconds)
    result.repeats["sqlite"] = [report]
    result.find("Longest gap between heartbeats, minus the interval", report["longest_gap"], "s", at_most=LEASE / 3)
    result.find("Longest heartbeat", report["longest_heartbeat"], "s", at_most=LEASE / 3)
    result.find("Failed heartbeats", report["failed"], "", at_most=0)
    return result


def _flood_and_beat(url: str, claim_id: str, given: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    patterns = _patterns()
    context = multiprocessing.get_context("fork")
    counts = context.Array("l", 3)
    ready, stop = context.Event(), context.Event()
    given = given | {"patterns": patterns, "counts": counts, "ready": ready, "stop": stop}
    flooder = context.Process(target=_flood, args=(url,), kwargs=given, daemon=True)
    flooder.start()
    ready.wait(60)
    try:
        report = _beat(url, claim_id, seconds=seconds)
    finally:
        stop.set()
        flooder.join(60)
        flooder.kill()
    created, trials, rejected = counts
    return report | {"sweeps": created, "steps": trials, "rejected": rejected, "patterns": len(patterns)}


def _beat(url: str, claim_id: str, *, seconds: float) -> dict[str, Any]:
    """Send heartbeats and measure the gaps between the ends of successful ones, minus the pause between two."""
    db = Database(url)
    began = last = time.monotonic()
    succeeded, failed, longest_gap, longest_heartbeat = 0, 0, 0.0, 0.0
    while (start := time.monotonic()) < began + seconds:
        try:
            claims.heartbeat(db, worker_id="w1", claim_ids=[claim_id], lease_seconds=LEASE)
            succeeded += 1
            end = time.monotonic()
            longest_gap, last = max(longest_gap, end - last - BEAT_SECONDS), end
        except Unavailable:
            failed += 1
        longest_heartbeat = max(longest_heartbeat, time.monotonic() - start)
        time.sleep(BEAT_SECONDS)
    db.close()
    longest_gap = max(longest_gap, time.monotonic() - last - BEAT_SECONDS)
    gaps = {"longest_gap": longest_gap, "longest_heartbeat": longest_heartbeat}
    return {"succeeded": succeeded, "failed": failed, "seconds": time.monotonic() - began, **gaps}


def _flood(
    url: str, *, caller: Caller, file_id: str, patterns: dict[str, int], counts: Any, ready: Any, stop: Any
) -> None:
    db = Database(url)
    body = {
        "model": "wide",
        "training_file": file_id,
        "lora": {"rank": 8, "rank_pattern": patterns},
        "parameters": {"optimizer.learning_rate": {"min": 1e-5, "max": 1e-3, "scale": "log"}},
        "search": {"type": "random", "trials": TRIALS},
        "objective": {"metric": "train_loss"},
    }
    request, numbers = SweepRequest.model_validate(body), itertools.count()

    def create() -> None:
        while not stop.is_set():
            try:
                creation.create(db, caller=caller, request=request, body_digest=str(next(numbers)))
                counts[0] += 1
                ready.set()
                while not stop.is_set() and controller.advance(db):
                    counts[1] += 1
            except LorryError:
                counts[2] += 1

    threads = [threading.Thread(target=create) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    db.close()


def _patterns() -> dict[str, int]:
    """Return enough slow keys to take about PATTERN_SECONDS together on this machine."""
    keys: dict[str, int] = {}
    took = 0.0
    while took < PATTERN_SECONDS and len(keys) < 32:
        keys[f"(?:.*?.*?z{len(keys)}z|q_proj)"] = 8
        lora = resolve_lora(LoraRequest.model_validate({"rank": 8, "rank_pattern": keys}))
        began = time.perf_counter()
        target_modules.adapted(DESCRIPTION, lora, base_name="wide", matcher=target_modules.Matcher())
        took = time.perf_counter() - began
    return keys
