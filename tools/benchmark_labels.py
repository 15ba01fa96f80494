"""Standard terms for the labels and notes of stored benchmark results, which older versions of the benchmarks wrote.

A result file stays as it was written. New results have these labels already, and no pattern matches them.
"""

import re

COUNT = r"(\d+ lanes?|\d+ threads?)"
BASELINES = {"peft_loop": "a plain PEFT loop", "peft_trainer": "PEFT + Trainer", "trl_sft": "TRL SFTTrainer"}
DATABASES = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}
REQUESTS = {"get": "Read a job", "list": "List jobs", "submit": "Submit a job"}
PAGES = {
    "jobs, first page": "first page of jobs",
    "jobs, a page in the middle": "middle page of jobs",
    "files": "page of files",
    "adapters": "page of adapters",
    "a job": "one job",
    "its events": "events of a job",
    "its checkpoints": "checkpoints of a job",
    "its curve": "loss curve of a job",
    "a long curve": "long loss curve",
    "why a job waits": "reason why a job waits",
    "the queue": "queue",
    "the workers": "workers",
    "a claim": "claim of a job",
    "the counts that are exposed": "job counts for the metrics",
}
RATES = {"creations": "jobs created per second", "reads": "jobs read per second", "lists": "job lists per second"}

STEADY_STATE = {
    rf"lorry, {COUNT}": r"Lorry, \1",
    rf"matrix rate, {COUNT}": r"Matmul rate, \1",
    rf"lorry's share of it \(4P a token\), {COUNT}": r"Lorry's fraction of the matmul rate (4P FLOPs per token), \1",
    rf"by processor time, {COUNT}": "{previous}, by CPU time",
}
for _name, _title in BASELINES.items():
    STEADY_STATE[rf"{_name}, {COUNT}"] = rf"{_title[0].upper()}{_title[1:]}, \1"
    STEADY_STATE[rf"lorry over {_name}, {COUNT}"] = rf"Speedup over {_title}, \1"

EIGHT_JOBS = {
    "lorry, seconds": "Lorry, all jobs: wall-clock time",
    "lorry, peak of a process": "Lorry, all jobs: peak memory of a process",
    "lorry, one job, seconds": "Lorry, one job: wall-clock time",
    "lorry, one job, peak of a process": "Lorry, one job: peak memory of a process",
    r"scripts (one after another|two at a time), from (\d+) of them, seconds": (
        r"Scripts \1, extrapolated from \2: wall-clock time"
    ),
    r"scripts (one after another|two at a time), seconds": r"Scripts \1: wall-clock time",
    r"scripts (one after another|two at a time), peak of a process": r"Scripts \1: peak memory of a process",
    r"scripts (one after another|two at a time), from (\d+) of them, over lorry": (
        r"Speedup over scripts \1, extrapolated from \2"
    ),
    r"scripts (one after another|two at a time), over lorry": r"Speedup over scripts \1",
    "peak over one script's": "Peak memory: Lorry with all jobs / one script",
    "peak over one job's of ours": "Peak memory: Lorry with all jobs / with one job",
}
LOSS_HEAD = {
    "chunked_head, peak": "Lorry's chunked head: peak memory",
    "chunked_head, time": "Lorry's chunked head: time",
    "plain_head, peak": "Plain head: peak memory",
    "plain_head, time": "Plain head: time",
    "plain over chunked, time": "Speedup over the plain head",
}
PACK_SCALING = {
    rf"1 jobs, {COUNT}": r"1 job, \1",
    rf"each slower than alone, {COUNT}": "{previous}: slowdown of each job",
    rf"memory of a further job, {COUNT}": r"Memory of each additional job, \1",
    rf"jobs let in, {COUNT}": r"Jobs that Lorry admits, \1",
    rf"each slower than alone, measured with (\d+), {COUNT}": r"\1 admitted jobs, \2: slowdown of each job",
}
SUBMISSION = {
    "submission to first step, base not loaded": "Submission to first step, base model not loaded",
    "submission to first step, (known|new) file": r"Submission to first step, \1 training file",
    "of which until it trains": "{previous}: until the job is running",
}
WARM_START = {
    "message to admission, warm": "Running trainer: request to admission",
    "message to the end of the first step, warm": "Running trainer: request to end of first step",
    "of which the step": "Running trainer: first step",
    "the second step, of another row": "Running trainer: second step, with another row",
    "told its base to ready, cold, stood by": "Warm standby trainer: base model request to ready",
    "of which the model's load": "{group}: loading the model",
    "beyond the load": "{group}: without loading the model",
    "launch to ready, cold, none stood by": "New trainer: launch to ready",
    "idle trainer, share of a core": "Idle trainer: fraction of a core",
    "one that stands by, share of a core": "Idle warm standby trainer: fraction of a core",
    "one that stands by, memory": "Idle warm standby trainer: memory",
    "script's start to first step": "PEFT + Trainer script: start to first step",
    "script over warm": "Time to first step: script / running trainer",
}
FROZEN_PREFIX = {
    "first epoch, prefixes kept": "First epoch, with cache",
    "later epoch, prefixes kept": "Later epoch, with cache",
    "epoch, nothing kept": "Epoch, without cache",
    r"FLOPs of blocks, nothing kept over kept: \(2P \+ 2Pk/L\) / \(4Pk/L\)": (
        "FLOPs of the blocks, without / with cache: (2P + 2Pk/L) / (4Pk/L)"
    ),
    "the same with the head's": "FLOPs of blocks and head, without / with cache",
    "nothing kept over kept": "Speedup of a later epoch",
    "by processor time": "Speedup of a later epoch, by CPU time",
    "kept, a token": "Cache size per token",
}
HOST_TOTAL = {
    r"(\d+ jobs?), (\d+) lanes": r"\1, one process with \2 lanes",
    "1 job, 1 lane": "1 job, one process with 1 lane",
    r"1 job, (\d+) lanes, slices of (\d+)": r"1 job, one process with \1 lanes, slices of \2 tokens",
    r"(\d+ jobs?), (\d+) processes": r"\1, \2 processes with 1 lane",
    "memory": "{previous}: memory",
    "lanes over processes": "Throughput ratio, lanes / processes",
    "by processor time": "Throughput ratio, lanes / processes, by CPU time",
}
SOAK = {
    "jobs submitted": "Jobs submitted",
    "jobs that succeeded": "Jobs that succeeded",
    "jobs put aside, for their trainers were killed time and again, and asked for again": (
        "Jobs quarantined after repeated kills of their trainers, and submitted again"
    ),
    "adapters": "Adapters",
    "problems found": "Problems found by the soak",
    "findings of the auditor": "Problems found by the auditor",
    "faults": "Injected faults",
    "the database was away": "Database unavailable",
    "the api was away": "API server unavailable",
    "from the last fault until every job had ended": "From the last fault until all jobs had finished",
    "longest time between two heartbeats, alone": "Longest time between two heartbeats, alone",
    "longest time between two heartbeats, next to the neighbor": (
        "Longest time between two heartbeats, next to the noisy neighbor"
    ),
    "cordons next to the neighbor": "Cordoned workers, next to the noisy neighbor",
    "trainers that crashed because of the neighbor's jobs": "Trainers that crashed because of the neighbor's jobs",
    "share of device-seconds next to the neighbor": (
        "Ordinary project's fraction of device-seconds, next to the noisy neighbor"
    ),
}
for _name, _title in REQUESTS.items():
    SOAK[rf"{_name}, (median|p95) amid faults / undisturbed"] = rf"{_title}: \1 latency, during faults / undisturbed"
    SOAK[rf"{_name}, p99 next to the neighbor / alone"] = f"{_title}: p99 latency, next to the noisy neighbor / alone"
    SOAK[rf"{_name}, p99 alone"] = f"{_title}: p99 latency, alone"

API_CLAIMS: dict[str, str] = {}
API_RATES = {
    "of its core, the api used": "{previous}, fraction of a core used by the API server",
    "a message between processes on one core and back": "Round trip of a message between processes on one core",
    "a message between processes on two cores and back": "Round trip of a message between processes on two cores",
}
API_SIZE: dict[str, str] = {}
API_LISTENERS: dict[str, str] = {}
for _name, _title in DATABASES.items():
    API_CLAIMS[rf"{_name}, claims a second of (\d+) workers at once"] = rf"{_title}: claims per second, \1 workers"
    API_LISTENERS[rf"{_name}, (\d+)(\d{{3}}) listeners of (one job|many jobs): the last one has it after"] = (
        rf"{_title}: event to the last of \1,\2 clients, streams of \3"
    )
    API_RATES[rf"{_name}, p99 of a creation at half that rate"] = (
        f"{_title}: p99 latency of a job creation, at half of the measured rate"
    )
    API_RATES[rf"{_name}, FastAPI alone, (a .+), a second"] = rf"{_title}: FastAPI alone, \1, requests per second"
    API_RATES |= {rf"{_name}, {what} a second": f"{_title}: {rate}" for what, rate in RATES.items()}
    API_SIZE |= {rf"{_name}, {what}: many over few": f"{_title}: {page}" for what, page in PAGES.items()}
API_HEARTBEATS = {
    "longest gap of a worker during a flood of sweeps": "Longest gap between heartbeats, minus the interval",
    "longest heartbeat of a worker during a flood of sweeps": "Longest heartbeat",
    "heartbeats that failed": "Failed heartbeats",
    r"Two other programs shared the two cores \(load 13\)\..*": (
        "Two other programs shared the two cores (load 13). In the file, `sqlite, before` is the same command just "
        "before two changes: writers queue, and patterns are matched outside of transactions. `steps` are transactions "
        "that created further trials. `rejected` are sweeps with patterns above the limit of 0.5 s, or status 503. "
        "Without load, the median of 3,000 writes took 3.0, 4.8 and 1.9 ms before the changes. After them it took 3.9, "
        "3.8 and 1.6 ms, which is within the noise."
    ),
}


def standard(labels: list[str], patterns: dict[str, str]) -> list[str]:
    """Return the labels of one result in standard terms. A label that no pattern matches stays as it is.

    In a replacement, {previous} is the label above that isn't part of another one, and {group} its part before a colon.
    """
    found: list[str] = []
    previous = ""
    for label in labels:
        text = label.strip()
        for pattern, replacement in patterns.items():
            if match := re.fullmatch(pattern, text):
                text = match.expand(replacement)
                break
        group = previous.partition(":")[0]
        is_part = "{previous}" in text or "{group}" in text
        text = text.replace("{previous}", previous).replace("{group}", group)
        previous = previous if is_part else text
        found.append(text)
    return found
