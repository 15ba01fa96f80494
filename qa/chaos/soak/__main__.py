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
from pathlib import Path

from qa.chaos.environment import Fault, Ground
from qa.chaos.soak import job_kinds, report
from qa.chaos.soak.run import Plan, Soak
from tests.worker_site import ROOT

ENVIRONMENT = {
    "LORRY_LEASE_SECONDS": "15",
    "LORRY_HEARTBEAT_SECONDS": "1",
    "LORRY_MAX_JOBS_PER_TRAINER": "8",
    "LORRY_IDLE_SECONDS": "30",
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    plan = Plan(
        seed=seed,
        minutes=options.minutes,
        calm_minutes=options.calm_minutes,
        isolation_minutes=options.isolation_minutes,
        patience_minutes=options.patience_minutes,
        num_jobs=options.jobs,
        num_workers=options.workers,
    )
    sys.stdout.write(f"seed {seed}: {plan.num_jobs} jobs, {plan.num_workers} workers, {plan.minutes:g} minutes\n")
    sys.stdout.flush()
    load_before = os.getloadavg()[0]
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the S3 server logs each request
    works = job_kinds.works(options.seeds)
    with tempfile.TemporaryDirectory(prefix="lorry-soak-") as folder, Ground(Path(folder)) as ground:
        with ground.site(_chance("alone", has_servers=False), "sqlite", has_weights=False) as site:
            undisturbed = job_kinds.train_alone(site, works)
        with ground.site(_chance("soak", has_servers=True), "postgresql", has_weights=False) as site:
            try:
                seen = Soak(site, plan, undisturbed, works).run()
            finally:
                if options.logs is not None:
                    _keep_logs(site.folder, options.logs)
    result = report.result_of(plan, seen, undisturbed)
    report.show(plan, seen, result)
    if options.out is not None:
        path = report.write(result, options.out, note=options.note, load_before=load_before)
        sys.stdout.write(f"{path}\n")
    return 1 if seen.problems or seen.findings else 0


def _chance(name: str, *, has_servers: bool) -> Fault:
    environment = ENVIRONMENT if has_servers else {}
    given = {"has_redis": has_servers, "has_s3": has_servers, "environment": environment}
    return Fault(name=name, what="chance", promise="", act=lambda _: "", **given)


def _keep_logs(folder: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("process-*.log"), *folder.glob("samples.jsonl")]:
        shutil.copy(path, to)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qa.chaos.soak", description=__doc__)
    parser.add_argument("--seed", type=int, help="Seed of the faults. Default: a random one, which is printed.")
    parser.add_argument("--minutes", type=float, default=20.0, help="Minutes with faults. Default: 20.")
    parser.add_argument("--calm-minutes", type=float, default=4.0, help="Minutes before the faults. Default: 4.")
    parser.add_argument(
        "--isolation-minutes",
        type=float,
        default=4.0,
        help="Minutes alone, and again as many next to a noisy neighbor, before the faults. Default: 4; 0: neither.",
    )
    parser.add_argument(
        "--patience-minutes",
        type=float,
        default=20.0,
        help="Minutes after the faults until all jobs must have finished. Default: 20.",
    )
    parser.add_argument("--jobs", type=int, default=300, help="Jobs to submit during the faults. Default: 300.")
    parser.add_argument("--workers", type=int, default=4, help="Concurrent workers. Default: 4.")
    parser.add_argument("--seeds", type=int, default=5, help="Seeds of each kind of job. Default: 5.")
    parser.add_argument("--out", type=Path, help=f"Folder for the results file: {ROOT.name}/benchmarks/results.")
    parser.add_argument("--note", help="Note for the results file, such as other load on the machine.")
    parser.add_argument("--logs", type=Path, help="Folder to which the logs of all processes are copied.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
