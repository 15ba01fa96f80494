"""`python -m qa.chaos.soak`: hundreds of jobs on one service, and a fault drawn by chance every few seconds.

Ends with tables, a results file, and a status that is not 0 where a job was lost, done twice, or has other
bytes, the API server took longer than twice its usual time, or a noisy neighbor disturbed other tenants.
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

from qa.chaos.environment import Ground
from qa.chaos.scenario import Row
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
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the S3 server tells each request
    works = job_kinds.works(options.seeds)
    with tempfile.TemporaryDirectory(prefix="lorry-soak-") as folder, Ground(Path(folder)) as ground:
        with ground.site(_row("alone", has_servers=False), "sqlite", has_weights=False) as site:
            undisturbed = job_kinds.train_alone(site, works)
        report.of_works(undisturbed)
        with ground.site(_row("soak", has_servers=True), "postgresql", has_weights=False) as site:
            try:
                seen = Soak(site, plan, undisturbed, works).run()
            finally:
                if options.logs is not None:
                    _keep_logs(site.folder, options.logs)
    report.of_run(plan, seen)
    if options.out is not None:
        path = report.write(plan, seen, undisturbed, options.out, note=options.note, load_before=load_before)
        sys.stdout.write(f"{path}\n")
    return 1 if seen.problems or seen.findings else 0


def _row(name: str, *, has_servers: bool) -> Row:
    environment = ENVIRONMENT if has_servers else {}
    given = {"has_redis": has_servers, "has_s3": has_servers, "environment": environment}
    return Row(name=name, fault="chance", also="", act=lambda _: "", **given)


def _keep_logs(folder: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("process-*.log"), *folder.glob("samples.jsonl")]:
        shutil.copy(path, to)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qa.chaos.soak", description=__doc__)
    parser.add_argument("--seed", type=int, help="Of the faults; else one is drawn, and told.")
    parser.add_argument("--minutes", type=float, default=20.0, help="Of faults (20).")
    parser.add_argument("--calm-minutes", type=float, default=4.0, help="Before them, to compare with (4).")
    parser.add_argument(
        "--isolation-minutes",
        type=float,
        default=4.0,
        help="Minutes alone, and again as many next to a noisy neighbor, before the faults. Default: 4; 0: neither.",
    )
    parser.add_argument("--patience-minutes", type=float, default=20.0, help="After them, until all has ended (20).")
    parser.add_argument("--jobs", type=int, default=300, help="Submitted amid the faults (300).")
    parser.add_argument("--workers", type=int, default=4, help="At a time (4).")
    parser.add_argument("--seeds", type=int, default=5, help="Of each kind of job (5).")
    parser.add_argument("--out", type=Path, help=f"Folder of the results file, as {ROOT.name}/benchmarks/results.")
    parser.add_argument("--note", help="What else the results file should say, as what the machine was busy with.")
    parser.add_argument("--logs", type=Path, help="Folder in which the logs of all processes are kept.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
