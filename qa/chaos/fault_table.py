"""All faults, in the order in which they run. Each has another mechanism.

A fault that depends on transactions, locks or leases runs on both databases, and any other on SQLite.
"""

from __future__ import annotations

from functools import partial

from catalog.states import EndReason
from qa.chaos.environment import DATABASES, POSTGRESQL, Fault
from qa.chaos.faults import backends, inference, jobs, processes, storage

COMPLETED = [EndReason.COMPLETED]
LOST = [EndReason.INFRA_LOST, EndReason.COMPLETED]
RESUMES = "its trainer is gone within a second; the job resumes at most one checkpoint back, with the same bytes"
LONG_LEASE = {"LORRY_LEASE_SECONDS": "60", "LORRY_HEARTBEAT_SECONDS": "1"}
kill_at = processes.kill_worker_at

WORKER_FAULTS = (
    Fault(
        name="worker-killed-after-claim",
        what="kill -9 of the worker after it has claimed",
        promise=RESUMES,
        act=partial(kill_at, failpoint="after_claim", reasons=LOST, has_trainer=False),
        databases=DATABASES,
    ),
    Fault(
        name="worker-killed-at-step",
        what="kill -9 of the worker at step 25 of 30",
        promise=RESUMES,
        act=processes.kill_worker_at_step_25,
        databases=DATABASES,
    ),
    Fault(
        name="worker-killed-storing",
        what="kill -9 of the worker while it stores a checkpoint",
        promise=RESUMES,
        act=partial(kill_at, failpoint="uploading", reasons=LOST),
        databases=DATABASES,
    ),
    Fault(
        name="worker-killed-in-complete",
        what="kill -9 of the worker in the completing transaction",
        promise=RESUMES,
        act=partial(kill_at, failpoint="in_complete", reasons=LOST),
        databases=DATABASES,
    ),
    Fault(
        name="worker-killed-after-complete",
        what="kill -9 of the worker after the completing commit",
        promise="its trainer is gone within a second; nothing runs again",
        act=partial(kill_at, failpoint="after_complete", reasons=COMPLETED),
        databases=DATABASES,
    ),
    Fault(
        name="worker-stopped",
        what="SIGSTOP of a worker for two leases, then SIGCONT",
        promise="its writes are refused, and its trainer exits without it",
        act=processes.stop_worker_for_two_leases,
        databases=DATABASES,
    ),
    Fault(
        name="worker-stopped-writing",
        what="SIGSTOP of a worker in the completing transaction, then SIGCONT",
        promise="its row is unlocked after half a minute; its writes are refused",
        act=processes.stop_worker_amid_its_write,
        databases=POSTGRESQL,
    ),
    Fault(
        name="worker-cut-off",
        what="one worker cut off from the database for two leases, then reconnected",
        promise="its writes are refused; its trainer exited before its lease expired",
        act=backends.cut_worker_off,
        databases=POSTGRESQL,
    ),
    Fault(
        name="all-sigterm",
        what="SIGTERM of worker and API server during training",
        promise="drained within the grace time; the attempt does not count",
        act=processes.terminate_worker_and_api,
        databases=DATABASES,
    ),
    Fault(
        name="trainer-killed",
        what="kill -9 of the trainer only",
        promise="the right reason, the job resumes",
        act=processes.kill_trainer,
    ),
    Fault(
        name="trainer-hang",
        what="the trainer hangs during training",
        promise="the progress timeout kills it, with its stacks in the job's log; the job resumes",
        act=processes.hang_trainer,
    ),
    Fault(
        name="trainer-oom-killed",
        what="the kernel kills the trainer because its cgroup is out of memory",
        promise="the right reason, the job resumes; the worker keeps running",
        act=processes.exhaust_memory,
    ),
    Fault(
        name="clocks-shifted",
        what="a worker's clock is an hour ahead, the API server's an hour behind",
        promise="leases unchanged: each worker keeps its job, and a killed one loses it after its lease",
        act=backends.shift_clocks,
        environment={"LORRY_LEASE_SECONDS": "20"},  # else a busy machine could lose a lease, which looks like an effect
        databases=DATABASES,
    ),
)
API_AND_JOB_FAULTS = (
    Fault(
        name="api-killed-before-commit",
        what="kill -9 of the API server before the commit of a submission",
        promise="no job; the retry creates one",
        act=partial(processes.kill_api_in_submission, failpoint="submit_before_commit", num_jobs=0),
        databases=DATABASES,
    ),
    Fault(
        name="api-killed-after-commit",
        what="kill -9 of the API server after the commit of a submission and before the response",
        promise="the retry returns the same job",
        act=partial(processes.kill_api_in_submission, failpoint="submit_after_commit", num_jobs=1),
        databases=DATABASES,
    ),
    Fault(
        name="api-sigterm",
        what="SIGTERM of the API server during a submission",
        promise="the request gets a response; exit status 0",
        act=processes.terminate_api_in_submission,
        databases=DATABASES,
    ),
    Fault(
        name="api-killed-in-webhook",
        what="kill -9 of the API server while it sends a webhook",
        promise="it is sent again with the same id",
        act=processes.kill_api_in_webhook,
    ),
    Fault(
        name="job-poison",
        what="a job that crashes its trainer each time",
        promise="quarantined with evidence; the others continue",
        act=jobs.poison,
    ),
    Fault(
        name="node-bad",
        what="a node whose trainers all die",
        promise="cordoned, without a quarantined job; the jobs succeed elsewhere",
        act=jobs.break_node,
        environment={"LORRY_MAX_JOBS_PER_TRAINER": "1"},
    ),
    Fault(
        name="job-diverged",
        what="a job that ruins its own weights, to a loss of NaN or infinity",
        promise="the right reason; packmates unaffected",
        act=jobs.diverge,
    ),
    Fault(
        name="cancel-waiting",
        what="cancel in validating_files, queued and paused",
        promise="at once; nothing trains",
        act=jobs.cancel_waiting,
    ),
    Fault(
        name="cancel-training",
        what="cancel during training",
        promise="device free within 30 s",
        act=jobs.cancel_in_training,
    ),
    Fault(
        name="cancel-racing",
        what="cancel when the adapter is stored and the completing transaction is about to begin",
        promise="one winner: the completion",
        act=jobs.cancel_in_completion,
        databases=DATABASES,
    ),
)
ANSWER_FAULTS = (
    *(
        Fault(
            name=f"inference-{name}-killed",
            what=f"kill -9 of the {name} during an answer, while a job trains",
            promise="the client reads the same answer to its end; the job succeeds; no request is left",
            act=partial(inference.kill_in_answer, of_trainer=name == "trainer"),
        )
        for name in ("worker", "trainer")
    ),
    Fault(
        name="inference-api-killed",
        what="kill -9 of the API server during an answer",
        promise="the client gets an error; the next API server answers; no request is left",
        act=inference.kill_api_in_answer,
    ),
    Fault(
        name="inference-client-never-reads",
        what="a client that never reads its answer",
        promise="other clients get theirs; its request is gone although it stays connected",
        act=inference.never_read,
    ),
)
BACKEND_FAULTS = (
    Fault(
        name="database-restarted",
        what="database restarted while a job trains",
        promise="submit 503 and Retry-After; no lease expires",
        act=backends.restart_database,
        databases=POSTGRESQL,
        environment=LONG_LEASE,
    ),
    Fault(
        name="database-killed-submitting",
        what="database killed in a submission's transaction",
        promise="503, no job; the retry creates one",
        act=backends.kill_database_in_submission,
        databases=POSTGRESQL,
    ),
    Fault(
        name="database-killed-completing",
        what="database killed in the completing transaction",
        promise="completed once",
        act=backends.kill_database_in_completion,
        databases=POSTGRESQL,
        environment=LONG_LEASE,
    ),
    Fault(
        name="database-locked",
        what="database locked for 33 s while a job trains",
        promise="submit waits, or 503 and Retry-After; no lease expires",
        act=backends.lock_database,
        databases=DATABASES,
        environment=LONG_LEASE,
    ),
    Fault(
        name="redis-stopped",
        what="Redis stopped during a training until an idle worker has finished a new job",
        promise="submits succeed; running jobs unaffected; idle workers poll; the queue drains afterwards",
        act=backends.stop_redis,
        has_redis=True,
        environment={"LORRY_LEASE_SECONDS": "12"},
    ),
    Fault(
        name="redis-flooded",
        what="one message a hundred times, and forged content",
        promise="one attempt; the other messages are ignored",
        act=backends.flood_redis,
        has_redis=True,
    ),
)
STORAGE_FAULTS = (
    Fault(
        name="checkpoint-damaged",
        what="the newest checkpoint has one bit flipped",
        promise="detected; the older one is used",
        act=storage.flip_bit_of_checkpoint,
    ),
    Fault(
        name="checkpoint-anothers",
        what="the row of the newest checkpoint names the intact files of another job",
        promise="detected; the older one is used, and both jobs have their own bytes",
        act=storage.swap_checkpoint,
    ),
    Fault(
        name="store-500-in-parts",
        what="S3: 500 for parts of a multipart upload, until the API server gives up, and then three times",
        promise="no partial file visible; retry idempotent",
        act=storage.fail_parts_of_upload,
        has_s3=True,
    ),
    *(
        Fault(
            name=f"store-{name}",
            what=f"S3: {what}",
            promise="no partial artifact visible; retry idempotent",
            act=partial(storage.break_store, fault=fault, also=also),
            has_s3=True,
        )
        for name, what, fault, also in (
            (
                "answer-lost",
                "the response to a successful write is lost, five times",
                storage.lose_answers,
                storage.until_all_failed,
            ),
            ("slow", "a checkpoint takes longer than a lease", storage.slow_down, storage.until_one_is_stored),
            ("expired", "credentials expire for two leases", storage.expire_credentials, storage.for_two_leases),
        )
    ),
    Fault(
        name="disk-full-trainers",
        what="disk full for trainers' checkpoints, events and logs",
        promise="reported by name; the last good checkpoint is kept",
        act=storage.fill_disk_of_trainers,
        small_disk="data/work",
        environment={"LORRY_LEASE_SECONDS": "30"},
    ),
    Fault(
        name="disk-full-store",
        what="disk full for the store",
        promise="reported by name; the last good checkpoint is kept",
        act=storage.fill_disk_of_store,
        small_disk="data/store",
        environment={"LORRY_LEASE_SECONDS": "30"},
    ),
    Fault(
        name="disk-full-database",
        what="disk full for SQLite",
        promise="reported by name; nothing is lost",
        act=storage.fill_disk_of_database,
        small_disk="database",
        environment={"LORRY_LEASE_SECONDS": "30"},
    ),
    Fault(
        name="lost-and-restored",
        what="database, store and all nodes are lost; a backup taken while the job trained is restored",
        promise="the job continues from the backup's checkpoint",
        act=storage.lose_all_and_restore,
        databases=DATABASES,
    ),
)
FAULTS: tuple[Fault, ...] = (
    *WORKER_FAULTS,
    *API_AND_JOB_FAULTS,
    *ANSWER_FAULTS,
    *BACKEND_FAULTS,
    *STORAGE_FAULTS,
)
