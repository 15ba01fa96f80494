"""`python -m qa.chaos.soak`: run hundreds of jobs on one service, with a random fault every few seconds.

It prints tables and can write a results file. The exit status is 1 if a job was lost, completed twice or has wrong
bytes, if the API server took longer than twice its usual time, or if a noisy neighbor disturbed other tenants.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks import results
from qa.chaos.environment import Fault, Ground
from qa.chaos.soak import job_kinds, report
from qa.chaos.soak.run import Plan, Soak

ENVIRONMENT = {
    "LORRY_LEASE_SECONDS": "15",
    "LORRY_HEARTBEAT_SECONDS": "1",
    "LORRY_MAX_JOBS_PER_TRAINER": "8",
    "LORRY_IDLE_SECONDS": "30",
}
UNDISTURBED = Fault(name="alone", what="none", promise="", act=lambda _: "")
RANDOM = Fault(
    name="soak", what="chance", promise="", act=lambda _: "", environment=ENVIRONMENT, has_redis=True, has_s3=True
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    plan = Plan(**{field.name: getattr(options, field.name) for field in fields(Plan)})
    print(f"seed {plan.seed}: {plan.jobs} jobs, {plan.workers} workers, {plan.minutes:g} minutes", flush=True)
    load_before = os.getloadavg()[0]
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the S3 server logs each request
    works = job_kinds.works(options.seeds)
    with tempfile.TemporaryDirectory(prefix="lorry-soak-") as folder, Ground(Path(folder)) as ground:
        with ground.site(UNDISTURBED, "sqlite", has_weights=False) as site:
            digests = job_kinds.train_alone(site, works)
        with ground.site(RANDOM, "postgresql", has_weights=False) as site:
            try:
                soak = Soak(site, plan, digests, works)
                soak.run()
            finally:
                if options.logs is not None:
                    options.logs.mkdir(parents=True, exist_ok=True)
                    for path in [*site.folder.glob("process-*.log"), *site.folder.glob("*.jsonl")]:
                        shutil.copy(path, options.logs)
            result = report.result_of(soak)
    report.show(soak, result)
    if options.out is not None:
        print(results.write(result, options.out, note=options.note, load_before=load_before, module="qa.chaos.soak"))
    return 1 if soak.problems or soak.findings else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qa.chaos.soak", description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(10**6), help="Seed of the faults. Default: random."
    )
    for name, default, text in (
        ("minutes", 20.0, "Minutes with faults."),
        ("calm-minutes", 4.0, "Minutes before the faults."),
        (
            "isolation-minutes",
            4.0,
            "Minutes alone, and as many next to a noisy neighbor, before the faults. 0: neither.",
        ),
        ("patience-minutes", 20.0, "Minutes after the faults until all jobs must have finished."),
        ("jobs", 300, "Jobs to submit during the faults."),
        ("workers", 4, "Concurrent workers."),
        ("seeds", 5, "Seeds of each kind of job."),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} Default: {default}.")
    parser.add_argument("--out", type=Path, help="Folder for the results file: benchmarks/results.")
    parser.add_argument("--note", help="Note for the results file, such as other load on the machine.")
    parser.add_argument("--logs", type=Path, help="Folder to which the logs of all processes are copied.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
