"""The page of benchmark results: per theme its question, method, caveat, command and table."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools import benchmark_labels as labels

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
INTRODUCTION = """\
# Benchmarks

Each table is one file in `benchmarks/results/`. The file has every repeat, all package versions and the machine.
Contenders alternate in one run, so that other load on the machine affects all of them. A ratio is the median of
the ratios within a turn, so it can differ from the ratio of two medians.

All results are from CPUs with two cores. No result is from a GPU yet. The [GPU kit](contributing/gpu-kit.md) measures
a GPU.

The training benchmarks use SmolLM2-135M in bf16 with all linear layers adapted, unless stated otherwise. Rows are
from GSM8K's training set: `--data` takes a JSONL file with `question` and `answer`.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """`command` measures the theme with the current version, or is empty if its program has been removed. `patterns`
    are of `benchmark_labels`."""

    title: str
    question: str
    method: str
    caveat: str
    command: str = ""
    patterns: dict[str, str] = field(default_factory=dict[str, str])


def _bench(theme: str) -> str:
    return f'make bench BENCH_ARGS="--only {theme} --data gsm8k_train.jsonl"'


def _bench_api(theme: str) -> str:
    return f'make bench-api BENCH_ARGS="--only {theme}"'


THEMES = {
    "steady_state": Theme(
        title="One job: throughput",
        question="How fast does one job train, compared with PEFT, Trainer and TRL?",
        method="Lorry, PEFT in a plain loop, PEFT with Trainer and TRL's SFTTrainer alternate step by step after a "
        "warm-up, with rank 16 and batch size 4. The matmul rate is that of the base model's frozen matmuls alone.",
        caveat="Trainer runs with its defaults. TRL packs rows to 1,024 tokens and does not use gradient "
        "checkpointing, which would cost time. P is the number of parameters of the base model.",
        command=_bench("steady_state"),
        patterns=labels.STEADY_STATE,
    ),
    "eight_jobs": Theme(
        title="Eight jobs: time and memory",
        question="How long do eight jobs take, and how much memory, compared with one script per job?",
        method="One trainer runs eight jobs of 20 steps, from its launch until PEFT has verified the last adapter. "
        "Scripts with PEFT and Trainer run one after another, and two at a time.",
        caveat="One run of each. Only two scripts run in each mode; the time of eight is extrapolated. Peak memory is "
        "that of one process, so two scripts at a time need about twice as much.",
        command=_bench("eight_jobs"),
        patterns=labels.EIGHT_JOBS,
    ),
    "earlier_version": Theme(
        title="One job: an earlier version",
        question="How much faster is one job on two cores without bf16 than in the version of 27 November 2026?",
        method="Lorry, commit d287a1d0 of Lorry, and PEFT with Trainer alternate step by step after a warm-up, in "
        "fp32, on two cores, with rank 16 and batch size 4. Both versions have the settings of their service. All "
        "are limited to AVX2 by environment variables.",
        caveat="A processor that has only AVX2 was not measured in this run.",
    ),
    "inference": Theme(
        title="Inference: many streams and adapters",
        question="How many tokens per second do 200 concurrent requests to 20 adapters get, also while jobs train?",
        method="`lorry up` with one CPU worker, in fp32. The `openai` client streams 200 greedy answers of at most "
        "32 tokens: all at once, all at once while two jobs train, and one after another. PEFT answers the first 40 "
        "requests one after another with `generate`, with all adapters loaded. The answers are compared.",
        caveat="One run of each. A trainer with requests and jobs gives training at most half of its time.",
        command=_bench("inference"),
    ),
    "loss_head": Theme(
        title="Loss head: memory and time",
        question="How much memory does the output head save when it computes the loss in chunks?",
        method="Forward and backward of the head alone, with 1,024 labels, 576 features and a vocabulary of 151,936. "
        "The plain head computes the logits of all labels at once in fp32.",
        caveat="Random weights. The head is only a part of a training step.",
        patterns=labels.LOSS_HEAD,
    ),
    "pack_scaling": Theme(
        title="Pack scaling",
        question="How do throughput and the slowdown of each job grow with the number of jobs in a pack?",
        method="Packs of 1 to 32 jobs with rank 8 and one row of 64 random tokens per step, with one and two lanes. "
        "Lorry then admits jobs up to its default slowdown limit of 4, and that pack is measured.",
        caveat="The rows are short, so that one job alone waits for memory. On a CPU without AMX, matmuls are slower, "
        "and jobs gain less from sharing a model. Longer rows were not measured.",
        patterns=labels.PACK_SCALING,
    ),
    "submission": Theme(
        title="Submission to first step",
        question="How long does a client wait from the submission of a job until it sees the first loss?",
        method="`lorry up` with one CPU worker. Jobs with batch size 1 alternate between a known training file and a "
        "new one, which is tokenized first.",
        caveat="One job at a time, on an idle service. The result without a loaded base model is one run.",
        patterns=labels.SUBMISSION,
    ),
    "warm_start": Theme(
        title="Trainer start",
        question="How soon does a trainer run the first step, with and without a warm standby trainer?",
        method="A running trainer, a warm standby trainer, a new trainer and a script with PEFT and Trainer alternate, "
        "all with batch size 1.",
        caveat="The base model is small: loading it takes a tenth of a second.",
        patterns=labels.WARM_START,
    ),
    "frozen_prefix": Theme(
        title="Cache of frozen layers",
        question="How much time does the cache of activations save if a job adapts only the upper layers?",
        method="Epochs of 32 rows alternate with and without the cache, with the upper 6 of 30 blocks adapted. The "
        "goal is 85% of the ratio of FLOPs of blocks and head.",
        caveat="The first epoch fills the cache and gains nothing. P is the number of parameters in the blocks, and k "
        "of L blocks are adapted.",
        patterns=labels.FROZEN_PREFIX,
    ),
    "host_total": Theme(
        title="Lanes and processes",
        question="Is one process with a lane per core as fast as one process per core?",
        method="Four jobs in one process with two lanes alternate with two processes of two jobs each. One job is also "
        "measured with slices of several sizes.",
        caveat="On this machine both cores are threads of one physical core.",
        patterns=labels.HOST_TOTAL,
    ),
    "gpu_host": Theme(
        title="Host time of LoRA on a GPU",
        question="How long does Python take to plan and launch the LoRA kernels of a linear layer in a tick?",
        method="16 jobs of rank 16 adapt all linear layers. The kernels do nothing. A plan has 512 tokens of each job. "
        "A result is the shortest of 3,000 ticks on a CPU. In a second run of 100 ticks, matmuls between the launches "
        "evict the caches of the CPU.",
        caveat="Triton's own launch and the copy of the tables to the GPU are not included. The CPU of a GPU node may "
        "be faster or slower.",
    ),
    "soak": Theme(
        title="Soak with faults and a noisy neighbor",
        question="Do all jobs succeed with the expected weights during injected faults, and how do latencies change?",
        method="API server, four Celery workers, Redis, PostgreSQL and an S3 server run jobs for 20 minutes with a "
        "random fault every few seconds. A second project misbehaves before that. "
        "[Reliability](reliability.md#soak) explains the figures.",
        caveat="One run with one seed. Latencies count only requests while API server and database were running.",
        command='make soak SOAK_ARGS="--seed 20261129"',
        patterns=labels.SOAK,
    ),
    "api_rates": Theme(
        title="API server: requests per second",
        question="How many requests per second does one API server answer on one core?",
        method="16 connections create jobs, read one job, and list 20 jobs, for 5 seconds each. FastAPI alone is "
        "measured alternately: it returns a constant, a constant from a thread, or a database row from a thread.",
        caveat="Client and database run on the same machine. The API server uses one of its two cores.",
        command=_bench_api("rates"),
        patterns=labels.API_RATES,
    ),
    "api_size": Theme(
        title="API server: large databases",
        question="Do requests become slower with a million stored jobs?",
        method="The same requests alternate between a database with 1,000,000 jobs and one with 10,000. A result is "
        "the median time with the larger database as a multiple of the median with the smaller one, which follows it.",
        caveat="The job counts for the metrics have no goal: monitoring reads them a few times per minute.",
        command=_bench_api("size"),
        patterns=labels.API_SIZE,
    ),
    "api_listeners": Theme(
        title="API server: live streams",
        question="How long does an event take to reach 10,000 clients of one API server?",
        method="All clients stream one job, or 100 jobs of which one has the event. Ten events are written one after "
        "another; a result is the median time from the commit until the last client has the event.",
        caveat="Clients and API server run on one machine.",
        patterns=labels.API_LISTENERS,
    ),
    "api_claims": Theme(
        title="Database: claims per second",
        question="How many jobs per second can workers claim?",
        method="50 processes claim one job at a time until a queue of 2,000 jobs is empty. No job is claimed twice.",
        caveat="The processes and the database share two cores.",
        patterns=labels.API_CLAIMS,
    ),
    "api_heartbeats": Theme(
        title="SQLite: heartbeats under load",
        question="Does a worker keep its lease while another process floods SQLite with sweeps?",
        method="Four threads create sweeps with slow patterns for 75 seconds, while a worker renews its claim every "
        "half second. The goal is a third of a lease.",
        caveat="SQLite only.",
        patterns=labels.API_HEARTBEATS,
    ),
}
"""In the order of the page. README quotes the first two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    label: str
    result: str
    goal: str
    is_missed: bool


def page() -> str:
    results = sorted(_results(), key=lambda entry: (_order(entry[1]["theme"]), entry[0]))
    sections = [_section(file_name, result) for file_name, result in results]
    return "\n".join(
        [INTRODUCTION, *_missed([result for _, result in results]), *(line for s in sections for line in s)]
    )


def _results() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in RESULTS.glob("*.json"):
        yield path.name, json.loads(path.read_text(encoding="utf-8"))


def _order(theme: str) -> int:
    return list(THEMES).index(theme) if theme in THEMES else len(THEMES)


def _title(result: dict[str, Any]) -> str:
    theme = THEMES.get(result["theme"])
    return theme.title if theme else result["theme"].replace("_", " ").capitalize()


def _missed(results: list[dict[str, Any]]) -> Iterator[str]:
    yield from ("## Missed goals", "", "| Benchmark | Measurement | Result | Goal |", "|---|---|---|---|")
    for result in results:
        for row in rows(result):
            if row.is_missed:
                yield f"| {_title(result)} | {row.label} | {row.result} | {row.goal.partition(':')[0]} |"
    yield ""


def _section(file_name: str, result: dict[str, Any]) -> Iterator[str]:
    theme, machine = THEMES.get(result["theme"]), result["machine"]
    yield from (f"## {_title(result)}", "")
    if theme:
        yield from (f"**{theme.question}**", "", theme.method, "", f"Caveat: {theme.caveat}", "")
    yield f"- Result file: `{file_name}`, {result['date']}"
    instructions = "".join(f", {name}" for name in machine.get("instructions", ())[:1])  # the fastest of them
    yield f"- Machine: {machine['cpu']}, {machine['cores']} cores{instructions}"
    if theme is None or theme.command:
        yield f"- Command: `{theme.command if theme else result['command']}`"
    else:
        yield f"- Measured with the version of {result['date']}. The program of this benchmark has been removed since."
    yield ""
    if result["note"]:
        yield from (*labels.standard([result["note"]], theme.patterns if theme else {}), "")
    yield from ("| Measurement | Result | Goal |", "|---|---|---|")
    for row in rows(result):
        yield f"| {row.label} | {row.result} | {row.goal} |"
    yield ""
    for subject, reason in result["left_out"].items():
        yield from (f"Not measured: {subject}. {reason}", "")


def rows(result: dict[str, Any]) -> list[Row]:
    """Return the table of a result, with its labels in standard terms."""
    theme = THEMES.get(result["theme"])
    names = labels.standard([finding["what"] for finding in result["findings"]], theme.patterns if theme else {})
    return [_row(_cell(name), finding) for name, finding in zip(names, result["findings"], strict=True)]


def _row(label: str, finding: dict[str, Any]) -> Row:
    figure, limit, is_limit = finding["figure"], finding["goal"], finding["is_limit"]
    result = f"{figure:,g} {_cell(finding['unit'])}".strip()
    if limit is None:
        return Row(label=label, result=result, goal="", is_missed=False)
    is_met = figure <= limit if is_limit else figure >= limit
    goal = f"{'at most' if is_limit else 'at least'} {limit:g}: {'met' if is_met else 'missed'}"
    return Row(label=label, result=result, goal=goal, is_missed=not is_met)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
