"""Queue listings, and the explanations of where a job stands."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.errors import InvalidRequest
from catalog.fleet import workers
from catalog.jobs import commands, explanation
from catalog.lifecycle import preparation
from catalog.queue import claims, listing, notifier
from catalog.registry import base_models
from catalog.resources import throughput
from catalog.resources.throughput import Speeds
from catalog.scheduling.snapshot import Capacity
from catalog.settings import Settings
from catalog.states import EndReason
from catalog.tasks import outcomes
from tests.catalog.db.interleaving import after_statement
from tests.catalog.world import World, begin_preparation, linears, sha


def explained(world: World, job_id: str) -> dict[str, Any]:
    return explanation.explain(world.db, **world.of(job_id))


def test_queue_is_listed_in_claim_order(world: World) -> None:
    normal, batch, urgent = (world.queued(priority=name) for name in ("normal", "batch", "urgent"))
    validating = world.submit()

    seen = listing.snapshot(world.db, project_id=None)

    assert [entry["job_id"] for entry in seen["jobs"]] == [urgent.id, normal.id, batch.id, validating.id]
    assert [entry["position"] for entry in seen["jobs"]] == [1, 2, 3, None]
    assert seen["counts"] == {"queued": 3, "validating_files": 1}
    order = [world.claim(capacity=Capacity(max_jobs=1, memory_bytes_free=10**12))[0].job.id for _ in range(3)]
    assert order == [urgent.id, normal.id, batch.id]


@pytest.mark.both_databases
def test_job_that_starts_while_it_is_explained_is_explained_as_queued(world: World) -> None:
    world.worker()
    job = world.queued()
    after_statement(world.db, "FROM jobs", world.claim)

    seen = explained(world, job.id)

    assert (seen["state"], seen.get("position")) == ("queued", 1)
    assert world.job(job.id).state == "running"


def test_project_sees_how_many_foreign_jobs_are_ahead_but_not_which(world: World) -> None:
    theirs = world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger), priority="urgent")
    mine = world.queued()

    seen = listing.snapshot(world.db, project_id=world.caller.project_id)

    assert [(entry["job_id"], entry["position"]) for entry in seen["jobs"]] == [(mine.id, 2)]
    assert seen["waiting_in_all"] == 2
    why = explained(world, mine.id)
    assert (why["position"], why["ahead"], why["ahead_of_this_project"]) == (2, 1, [])
    assert theirs.id not in str(why)


def test_large_project_uses_the_listing_space_that_others_leave(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_SHOWN", 40)
    last = world.queued()
    world.flood(last, 29)
    world.queued(priority="urgent")
    world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    world.prepare_all()

    shown = listing.snapshot(world.db, project_id=world.caller.project_id)

    assert shown["waiting_in_all"] == 32
    assert [entry["position"] for entry in shown["jobs"] if entry["position"] is None] == []


def test_explanation_of_a_distant_job_counts_jobs_of_its_project(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.worker()
    monkeypatch.setattr(listing, "MAX_SHOWN", 10)
    world.flood(world.queued(), 30)
    world.clock.advance(1)
    last = world.queued()

    why = explanation.explain(world.db, **world.of(last.id))

    assert (why["ahead_at_least"], why["ahead_of_this_project_in_all"]) == (10, 31)
    assert why["explanation"] == (
        "More than 10 jobs are ahead of it. In its own project, 31 jobs are ahead of it with the same priority."
    )


def test_has_work_is_true_only_if_something_can_be_claimed(world: World) -> None:
    assert not notifier.has_work(world.db)
    job = world.submit()
    assert notifier.has_work(world.db)
    world.prepare_all()
    assert notifier.has_work(world.db)

    (claim,) = world.claim()
    assert not notifier.has_work(world.db)
    claims.end(world.db, claim.claim_id, reason=EndReason.TRAINER_CRASHED, detail="")
    assert not notifier.has_work(world.db)
    world.clock.advance(3)
    assert notifier.has_work(world.db)

    commands.cancel(world.db, **world.of(job.id))
    assert not notifier.has_work(world.db)
    base_models.add(world.db, name="new", kind="hub", source="org/new", revision=None)
    assert notifier.has_work(world.db)


def test_explanation_of_a_job_in_validation(world: World) -> None:
    first, job = world.submit(), world.submit()
    assert explained(world, job.id)["explanation"] == explanation.NO_WORKER

    world.worker()
    assert explained(world, job.id)["explanation"] == (
        "Its files wait for tokenization. 1 job is ahead of it in its project."
    )

    claimed = begin_preparation(world.db, "w1")
    assert claimed is not None
    assert explained(world, first.id)["explanation"] == "Worker w1 is tokenizing its files."
    outcomes.release(world.db, claimed.task, preparation.PREPARATION, wait_seconds=9)
    assert explained(world, first.id)["explanation"] == "Tokenization of its files will be retried in 9 s."


def test_explanation_of_a_queued_job(world: World) -> None:
    world.base("other")
    first, second = world.queued(), world.queued(model="other")
    assert explained(world, first.id)["explanation"] == explanation.NO_WORKER

    world.worker()
    assert explained(world, first.id)["explanation"] == (
        "It is first in the queue and waits for a worker with free capacity."
    )
    assert explained(world, second.id)["explanation"] == "1 job is ahead of it."

    workers.worker_beat(world.db, "w1", resident_base=sha("smol"), trainer_id="t", report=None)
    held = explained(world, second.id)
    assert held["resident_bases"] == [sha("smol")]
    assert "The running workers have other base models loaded" in held["explanation"]
    workers.worker_beat(world.db, "w1", resident_base=sha("other"), trainer_id="t", report=None)
    assert "It starts as soon as that worker has memory for one more job" in explained(world, second.id)["explanation"]


def test_explanation_of_a_job_delayed_by_the_slowdown_limit(world: World) -> None:
    world.worker()
    held = world.running()
    workers.register_trainer(
        world.db, trainer_id="t", worker_id="w1", base_digest=held.job.base_digest, pack_key=held.job.pack_key
    )
    waiting = world.queued()

    def reported(speeds: Speeds, *, num_jobs: int) -> str:
        report = {"saturation": throughput.described(num_jobs, speeds, Settings(max_slowdown=4), 0)}
        workers.worker_beat(world.db, "w1", resident_base=held.job.base_digest, trainer_id="t", report=report)
        return explained(world, waiting.id)["explanation"]

    assert reported(Speeds(alone=((64, 900.0),), together=((256, 1000.0),)), num_jobs=4) == (
        "It is first in the queue. Its base model is loaded, but the trainer is full: with 4 jobs, each takes up to "
        "3.6 times as long as alone. One more job would raise this to 4.5, and LORRY_MAX_SLOWDOWN is 4. The job starts "
        "when one of them finishes."
    )
    assert "It starts as soon as that worker has memory for one more job" in reported(Speeds(), num_jobs=16), (
        "without measured speeds a seventeenth job may join"
    )


def test_explanation_of_a_job_with_another_precision(world: World) -> None:
    world.worker()
    held = world.running()
    workers.register_trainer(
        world.db, trainer_id="t", worker_id="w1", base_digest=held.job.base_digest, pack_key=held.job.pack_key
    )
    workers.worker_beat(world.db, "w1", resident_base=held.job.base_digest, trainer_id="t", report=None)
    same, other = world.queued(), world.queued(precision="float32")

    assert explained(world, same.id)["explanation"] == (
        "It is first in the queue. A worker has its base model loaded. It starts as soon as that worker has memory for "
        "one more job."
    )
    why = explained(world, other.id)
    assert (why["precision"], why["resident_precisions"]) == ("float32", ["bfloat16"])
    assert why["explanation"] == (
        "1 job is ahead of it. Its base model is loaded in bfloat16, but it needs float32, so it waits until "
        "a worker has loaded that. Later jobs for a loaded base model may start before it, for at most 60 s."
    )
    world.pass_time(61)
    workers.worker_beat(world.db, "w1", resident_base=held.job.base_digest, trainer_id="t", report=None)
    assert explained(world, other.id)["explanation"].endswith(
        "Later jobs no longer start before it. It starts when the running jobs have finished."
    )


def test_other_precision_gets_no_priority_for_a_loaded_base(world: World) -> None:
    """The claim decision agrees with the explanation."""
    world.base("other")
    world.worker()
    held = world.running()
    workers.register_trainer(
        world.db, trainer_id="t", worker_id="w1", base_digest=held.job.base_digest, pack_key=held.job.pack_key
    )
    workers.worker_beat(world.db, "w1", resident_base=held.job.base_digest, trainer_id="t", report=None)
    head, precise = world.queued(model="other"), world.queued(precision="float32")
    why = explained(world, precise.id)["explanation"]
    world.complete(held.claim_id)

    capacity = Capacity(max_jobs=1, memory_bytes_free=10**12, resident_key=held.job.pack_key)
    (first,) = world.claim(capacity=capacity)

    assert first.job.id == head.id
    assert "1 job is ahead of it. Its base model is loaded in bfloat16, but it needs float32, so it waits" in why


def test_job_memory_includes_the_dropout_mask(world: World) -> None:
    plain, dropping = world.queued(), world.queued(lora={"dropout": 0.1})

    with world.db.read() as session:
        own = {
            entry.candidate.job_id: entry.candidate.own_bytes
            for entry in listing.queue_entries(session, now=world.clock())
        }

    products = 1024 * 4 * 16 * 2  # of rank 16 in four linear layers
    vectors = (16 + 2 + 8) * plain.adapter_parameters  # including a bf16 copy and two further slices
    assert own[plain.id] == vectors + products
    assert own[dropping.id] == own[plain.id] + 1024 * (2 * 64 + 2 * 64)


def test_position_reason_of_the_first_job_counts_none_ahead(world: World) -> None:
    world.running()
    first, second = world.queued(), world.queued()

    reasons = [explained(world, job.id) for job in (first, second)]

    assert [why["position"] for why in reasons] == [1, 2]
    assert "1 of its project's jobs runs, no other waits before it;" in reasons[0]["position_reason"]
    assert "1 of its project's jobs runs and 1 waits before it;" in reasons[1]["position_reason"]


def test_explanation_of_a_job_that_fits_no_worker(world: World) -> None:
    world.base("huge", num_parameters=10**12)
    world.worker(memory_bytes=10**9)

    why = explained(world, world.queued(model="huge").id)

    assert "the largest worker has 1.0 GB" in why["explanation"]


def test_explanation_of_a_job_that_exceeds_the_free_memory(world: World) -> None:
    job, reported = world.queued(), {"resident_base": None, "trainer_id": None}
    world.worker("w1", memory_bytes=10**10)
    world.worker("w2", memory_bytes=10**5)

    def why(*free: int | None) -> str:
        for worker_id, free_bytes in zip(("w1", "w2"), free, strict=True):
            report = None if free_bytes is None else {"capacity": {"max_jobs": 4, "memory_bytes_free": free_bytes}}
            workers.worker_beat(world.db, worker_id, **reported, report=report)
        return explained(world, job.id)["explanation"]

    sentence = "Worker w1 is idle, but only 100.0 kB of its 10.0 GB are free"
    assert sentence in why(10**5, 10**5)
    assert sentence not in why(10**10, 10**5)
    assert sentence not in why(10**5, None), "w2 has not reported its free memory yet"
    assert workers.worker_beat(world.db, "w2", resident_base="other", trainer_id="t", report=None)
    assert sentence in explained(world, job.id)["explanation"]


def test_long_rows_that_only_fit_a_gpu_are_too_large_for_a_cpu(world: World) -> None:
    world.base("deep", hidden_size=64, num_layers=100, **linears(q_proj=([64, 64], 100)))
    job = world.submit(model="deep", lora={"target_modules": ["q_proj"]})
    world.prepare_all(longest_example=50_000)
    world.worker("small", memory_bytes=10**9)

    on_a_cpu = explained(world, job.id)["explanation"]
    world.worker("small-gpu", memory_bytes=15 * 10**8, kind="cuda")

    assert "The job needs about 1.4 GB, but the largest worker has 1.0 GB" in on_a_cpu
    assert "the largest worker" not in explained(world, job.id)["explanation"]


def test_explanation_of_a_job_that_backs_off_after_a_failure(world: World) -> None:
    claim = world.running()
    claims.end(world.db, claim.claim_id, reason=EndReason.TRAINER_CRASHED, detail="")

    assert explained(world, claim.job.id)["explanation"] == (
        "Retrying in 2 s after a failed attempt (trainer_crashed)."
    )
    world.clock.advance(3)
    (claim,) = world.claim()
    claims.end(world.db, claim.claim_id, reason=EndReason.TRAINER_CRASHED, detail="")
    world.clock.advance(9)
    world.worker()
    assert "It waits for an idle worker and trains alone there" in explained(world, claim.job.id)["explanation"]


def test_explanations_of_all_other_states(world: World) -> None:
    cancelled, paused = world.submit(), world.submit()
    verb: dict[str, Any] = {"project_id": world.caller.project_id}
    commands.cancel(world.db, job_id=cancelled.id, **verb)
    commands.pause(world.db, job_id=paused.id, **verb)
    failed, succeeded, running = (world.running() for _ in range(3))
    claims.end(world.db, failed.claim_id, reason=EndReason.USER_ERROR, detail="Too long.")
    world.complete(succeeded.claim_id)

    sentences = {
        name: explained(world, job_id)["explanation"]
        for name, job_id in {
            "cancelled": cancelled.id,
            "paused": paused.id,
            "failed": failed.job.id,
            "succeeded": succeeded.job.id,
            "running": running.job.id,
        }.items()
    }

    assert sentences == {
        "cancelled": "It was cancelled.",
        "paused": f"It is paused. To continue where it stopped: `lorry jobs resume {paused.id}`.",
        "failed": "It failed. Too long. "
        "Correct the file or the setting that the message names, and submit the job again.",
        "succeeded": f"It has succeeded: its adapter is {world.job(succeeded.job.id).adapter_name}.",
        "running": "It is starting on worker w1, attempt 1. The base model is being loaded.",
    }
    claims.started(world.db, running.claim_id, trainer_id="trainer-w1", resumed_from_step=None)
    assert explained(world, running.job.id)["explanation"] == "It is training on worker w1, attempt 1."
    commands.pause(world.db, job_id=running.job.id, **verb)
    assert "asked to save a checkpoint" in explained(world, running.job.id)["explanation"]
    commands.cancel(world.db, job_id=running.job.id, **verb)
    assert "asked to stop it" in explained(world, running.job.id)["explanation"]
    assert explained(world, running.job.id)["why"]["role"] == "anchor"


def test_explanation_of_a_job_that_needs_quantization_support(world: World) -> None:
    job = world.queued(quantization="nf4")
    world.worker("plain")

    assert world.claim("plain") == []
    why = explained(world, job.id)
    assert why["quantization"] == "nf4"
    assert why["explanation"] == (
        "It needs its base model in nf4, but no running worker has bitsandbytes. Install bitsandbytes on a worker "
        "(`pip install 'lorry-server[quant]'`), then restart the worker."
    )

    world.worker("able", quantizations=("nf4", "int8"))
    assert (
        explained(world, job.id)["explanation"] == "It is first in the queue and waits for a worker with free capacity."
    )
    assert [claim.job.id for claim in world.claim("able")] == [job.id]


def test_unavailable_quantization_is_rejected_with_a_remedy(world: World) -> None:
    world.worker()

    with pytest.raises(InvalidRequest) as refusal:
        world.submit(quantization="int8")

    assert (refusal.value.code, refusal.value.param) == ("quantization_unavailable", "quantization")
    assert "pip install 'lorry-server[quant]'" in refusal.value.remedy
    assert world.submit().spec["quantization"] == "none"


def test_dora_on_a_quantized_base_is_rejected_at_submission(world: World) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        world.submit(quantization="nf4", lora={"use_dora": True})

    assert (refusal.value.code, refusal.value.param) == ("conflicting_value", "lora.use_dora")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_weight_based_init_on_a_quantized_base_is_rejected(world: World, init: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        world.submit(quantization="nf4", lora={"init_lora_weights": init})

    assert (refusal.value.code, refusal.value.param) == ("conflicting_value", "lora.init_lora_weights")
    assert world.submit(quantization="nf4", lora={"init_lora_weights": "gaussian"}).state == "validating_files"


def test_memory_of_a_pissa_job_includes_its_initialization(world: World) -> None:
    plain = world.queued(precision="float32")
    begun = world.queued(lora={"init_lora_weights": "pissa"}, precision="float32")

    with world.db.read() as session:
        own = {
            entry.candidate.job_id: entry.candidate.own_bytes
            for entry in listing.queue_entries(session, now=world.clock())
        }

    products = 1024 * 4 * 16 * 4  # of the start, with rank 16 in four linear layers
    assert own[begun.id] == own[plain.id] + 2 * 4 * begun.adapter_parameters + products


def test_different_quantizations_of_one_base_do_not_train_together(world: World) -> None:
    world.worker(quantizations=("nf4", "int8"))
    plain, nf4, int8 = world.queued(), world.queued(quantization="nf4"), world.queued(quantization="int8")
    (claim,) = world.claim()
    assert claim.job.id == plain.id
    held = claim.job
    workers.register_trainer(
        world.db, trainer_id="t", worker_id="w1", base_digest=held.base_digest, pack_key=held.pack_key
    )
    workers.worker_beat(world.db, "w1", resident_base=held.base_digest, trainer_id="t", report=None)

    assert (
        "Its base model is loaded in bfloat16, but it needs nf4 with bfloat16, so it waits"
        in explained(world, nf4.id)["explanation"]
    )
    assert world.claim(pack_key=held.pack_key, trainer_id="t") == []
    assert [[claim.job.id for claim in world.claim()] for _ in range(2)] == [[nf4.id], [int8.id]]


def test_job_that_a_worker_cannot_run_does_not_block_joiners(world: World) -> None:
    world.worker("plain")
    world.worker("able", quantizations=("nf4",))
    held = world.running().job
    waiting = world.queued(quantization="nf4")
    world.pass_time(61)
    joiner = world.queued()

    joined = world.claim("plain", pack_key=held.pack_key, trainer_id="t")

    assert [claim.job.id for claim in joined] == [joiner.id]
    assert world.job(waiting.id).state == "queued"
