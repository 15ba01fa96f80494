"""Many concurrent streams over many adapters of one base model, with and without training, compared with PEFT.

The service runs on this machine. Every answer is compared with the one that the service gives to the request alone, and
with PEFT's. Two jobs train twice: alone, and during the streams. Their adapters must have the same bytes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeVar

import openai

from benchmarks.plan import Plan
from benchmarks.results import Result
from benchmarks.workload import ROOT
from lorry import Lorry

GOAL_SPEEDUP = 4.0
NAME = "base"
PATIENCE_SECONDS = 600.0
STOP_SECONDS = 90.0
POLL_SECONDS = 0.5
CLIENT_SECONDS = 3600.0
Value = TypeVar("Value")


@dataclass(kw_only=True, slots=True)
class Answers:
    """Answers to requests, in order, and the seconds from the first request to the last token."""

    seconds: float = 0.0
    texts: list[str] = field(default_factory=list[str])
    num_tokens: int = 0
    first_seconds: list[float] = field(default_factory=list[float])

    def report(self) -> dict[str, Any]:
        return {"tokens": self.num_tokens, "seconds": self.seconds, "first_seconds": self.first_seconds}


def run(plan: Plan) -> Result:
    sizes = plan.inference
    result = Result(theme="inference", settings=plan.settings() | {"dtype": "float32"} | sizes)
    with _service(plan.folder) as lorry:
        lorry.models.add(NAME, str(plan.workload.base), kind="folder")
        lorry.models.wait(NAME, timeout_seconds=PATIENCE_SECONDS)
        file = _upload(plan, lorry)
        jobs = _submit(lorry, file, plan, count=sizes["adapters"], steps=sizes["adapter_steps"], first_seed=100)
        adapters = _wait(lorry, jobs)
        requests = _requests(plan, adapters)
        _ask(lorry, requests[:1], concurrent=1)  # opens connections and loads an adapter

        undisturbed, alone_rate = _train_alone(lorry, file, plan)
        quiet = _ask(lorry, requests, concurrent=len(requests))
        busy, disturbed, busy_rate = _ask_while_training(lorry, file, plan, requests)
        single = _ask(lorry, requests, concurrent=1)
        folders = {name: lorry.adapters.pull(name, plan.folder / f"adapter-{i}") for i, name in enumerate(adapters)}
        digests = [_weights(lorry, name) for name in (*undisturbed, *disturbed)]
    peer = _peer(plan, folders, requests[: sizes["peer_requests"]])

    result.repeats = {
        "Lorry, streams, no training": [quiet.report()],
        "Lorry, streams, two jobs training": [busy.report()],
        "Lorry, one request at a time": [single.report()],
        "transformers and PEFT, one request at a time": [peer.report()],
    }
    result.find(
        "Answers that differ from the answer alone",
        _differ(busy, single) + _differ(quiet, single),
        "answers",
        at_most=0,
    )
    result.find("Answers that differ from PEFT", _differ(peer, single), "answers", at_most=0)
    half = len(digests) // 2
    changed = sum(one != other for one, other in zip(digests[:half], digests[half:], strict=True))
    result.find("Jobs that inference changed", changed, "jobs", at_most=0)
    _conclude(result, busy=busy, quiet=quiet, single=single, peer=peer)
    result.find("Training alone", alone_rate, "steps/s")
    result.find("Training during the streams", busy_rate, "steps/s")
    result.find("Training throughput lost", 100 * (1 - busy_rate / alone_rate), "%")
    return result


@contextmanager
def _service(folder: Path) -> Iterator[Lorry]:
    """Run `lorry up` in a new data folder within `folder`, and stop it at the end."""
    data_dir = Path(tempfile.mkdtemp(prefix="service-", dir=folder))
    log = data_dir.with_suffix(".log")
    argv = [sys.executable, "-m", "lorry", "up", "--json", "--devices", "cpu", "--data-dir", str(data_dir)]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, "LORRY_REQUESTS_PER_MINUTE": "0"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        ready = process.stdout.readline() if process.stdout else ""
        if not ready:
            raise RuntimeError(f"the service did not start:\n{log.read_text('utf-8', 'replace')}")
        with Lorry(data_dir=data_dir) as lorry:
            yield lorry
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers as well
            process.wait()


def _conclude(result: Result, *, busy: Answers, quiet: Answers, single: Answers, peer: Answers) -> None:
    rates = {name: (reports[0]["tokens"] / reports[0]["seconds"]) for name, reports in result.repeats.items()}
    for name, rate in rates.items():
        result.find(name, rate, "tokens/s")
    own = peer.num_tokens / peer.seconds
    result.find("Speedup over PEFT, two jobs training", busy.num_tokens / busy.seconds / own, "x", goal=GOAL_SPEEDUP)
    result.find("Speedup over PEFT, no training", quiet.num_tokens / quiet.seconds / own, "x", goal=GOAL_SPEEDUP)
    for name, answers in (("two jobs training", busy), ("no training", quiet)):
        result.find(f"Time to first token, median, {name}", median(answers.first_seconds), "s")
        result.find(f"Time to first token, 95th percentile, {name}", _p95(answers.first_seconds), "s")
    result.find("Time to first token, median, one request at a time", median(single.first_seconds), "s")
    result.find("PEFT: time to first token, median", median(peer.first_seconds), "s")


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20)[-1] if len(values) > 1 else values[0]


def _differ(found: Answers, expected: Answers) -> int:
    """Return the number of answers that differ. `expected` may have more."""
    return sum(one != other for one, other in zip(found.texts, expected.texts, strict=False))


def _upload(plan: Plan, lorry: Lorry) -> str:
    path = plan.folder / "rows.jsonl"
    lines = (json.dumps({"prompt": question, "completion": f" {answer}"}) for question, answer in plan.workload.texts)
    path.write_text("\n".join(lines), "utf-8")
    return lorry.files.upload(path).id


def _submit(lorry: Lorry, file: str, plan: Plan, *, count: int, steps: int, first_seed: int) -> list[str]:
    return [
        lorry.jobs.create(
            model=NAME,
            training_file=file,
            max_steps=steps,
            hyperparameters={"batch_size": 1},
            lora={"rank": plan.rank},
            precision="float32",
            seed=first_seed + number,
        ).id
        for number in range(count)
    ]


def _wait(lorry: Lorry, jobs: Sequence[str]) -> list[str]:
    """Wait until the jobs have succeeded. Return the names of their adapters."""
    ended = [lorry.jobs.wait(job, timeout_seconds=CLIENT_SECONDS, poll_seconds=POLL_SECONDS) for job in jobs]
    names = [job.fine_tuned_model for job in ended]
    if not all(names):
        raise RuntimeError(f"a job failed: {ended}")
    return [str(name) for name in names]


def _submit_two(lorry: Lorry, file: str, plan: Plan) -> list[str]:
    """Submit the two jobs, and wait until both train."""
    jobs = _submit(lorry, file, plan, count=2, steps=plan.inference["job_steps"], first_seed=1)
    while not all(lorry.jobs.metrics(job) for job in jobs):
        time.sleep(POLL_SECONDS)
    return jobs


def _num_steps(lorry: Lorry, jobs: Sequence[str]) -> int:
    return sum(len(lorry.jobs.metrics(job)) for job in jobs)


def _train_alone(lorry: Lorry, file: str, plan: Plan) -> tuple[list[str], float]:
    """Return the adapters of the two jobs without other load, and their steps per second together."""
    jobs = _submit_two(lorry, file, plan)
    began, before, steps = time.monotonic(), _num_steps(lorry, jobs), 2 * plan.inference["job_steps"]
    while (after := _num_steps(lorry, jobs)) < 0.9 * steps:  # before the first of them exports its adapter
        time.sleep(POLL_SECONDS)
    rate = (after - before) / (time.monotonic() - began)
    return _wait(lorry, jobs), rate


def _ask_while_training(
    lorry: Lorry, file: str, plan: Plan, requests: Sequence[dict[str, Any]]
) -> tuple[Answers, list[str], float]:
    jobs = _submit_two(lorry, file, plan)
    began, before = time.monotonic(), _num_steps(lorry, jobs)
    answers = _ask(lorry, requests, concurrent=len(requests))
    after, seconds = _num_steps(lorry, jobs), time.monotonic() - began
    if after == 2 * plan.inference["job_steps"]:
        raise RuntimeError("The jobs ended before the last answer. Increase job_steps in benchmarks/plan.py.")
    return answers, _wait(lorry, jobs), (after - before) / seconds


def _requests(plan: Plan, adapters: Sequence[str]) -> list[dict[str, Any]]:
    """Return greedy requests with the shortest questions. They take turns over the adapters."""
    sizes = plan.inference
    questions = sorted((question for question, _ in plan.workload.texts), key=len)
    return [
        {
            "model": adapters[number % len(adapters)],
            "messages": [{"role": "user", "content": questions[number % len(questions)]}],
            "temperature": 0,
            "max_tokens": sizes["max_tokens"],
        }
        for number in range(sizes["requests"])
    ]


def _ask(lorry: Lorry, requests: Sequence[dict[str, Any]], *, concurrent: int) -> Answers:
    return _in_thread(_ask_async(lorry.url, str(lorry.api_key), requests, concurrent))


async def _ask_async(url: str, key: str, requests: Sequence[dict[str, Any]], concurrent: int) -> Answers:
    """Stream the answers of `concurrent` requests at a time."""
    places = asyncio.Semaphore(concurrent)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, timeout=CLIENT_SECONDS) as client:

        async def answer(request: dict[str, Any]) -> tuple[str, int, float]:
            async with places:
                began, first, parts, tokens = time.monotonic(), 0.0, list[str](), 0
                stream = await client.chat.completions.create(
                    stream=True, stream_options={"include_usage": True}, **request
                )
                async with stream:
                    async for chunk in stream:
                        said = [choice.delta.content for choice in chunk.choices if choice.delta.content]
                        first = first or (time.monotonic() - began if said else 0.0)
                        parts += said
                        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
                return "".join(parts), tokens, first

        began = time.monotonic()
        found = await asyncio.gather(*map(answer, requests))
    return Answers(
        seconds=time.monotonic() - began,
        texts=[text for text, _, _ in found],
        num_tokens=sum(tokens for _, tokens, _ in found),
        first_seconds=[first for _, _, first in found],
    )


def _in_thread(coroutine: Coroutine[Any, Any, Value]) -> Value:
    """Run an event loop in a thread of its own, because the calling thread may have one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _weights(lorry: Lorry, adapter: str) -> str:
    """Return the digest of an adapter's weights."""
    files = lorry.adapters.manifest(adapter)["data"]
    return next(file["digest"] for file in files if file["path"] == "adapter_model.safetensors")


def _peer(plan: Plan, folders: dict[str, Path], requests: Sequence[dict[str, Any]]) -> Answers:
    numbers = {name: f"adapter{index}" for index, name in enumerate(folders)}  # PEFT allows no colon in a name
    given = {
        "base": str(plan.workload.base),
        "threads": os.cpu_count(),
        "adapters": {numbers[name]: str(folder) for name, folder in folders.items()},
        "requests": [
            {"adapter": numbers[one["model"]], "messages": one["messages"], "max_tokens": one["max_tokens"]}
            for one in requests
        ],
    }
    path = plan.folder / "peer.json"
    path.write_text(json.dumps(given), "utf-8")
    argv = [sys.executable, "-W", "ignore", "-m", "benchmarks.peft_generate", str(path)]
    with (plan.folder / "peer.log").open("wb") as log:
        printed = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, check=True).stdout
    found = json.loads(printed)
    return Answers(
        seconds=sum(one["seconds"] for one in found),
        texts=[one["text"] for one in found],
        num_tokens=sum(one["tokens"] for one in found),
        first_seconds=[one["first_seconds"] for one in found],
    )
