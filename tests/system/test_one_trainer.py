"""Continuous batching: jobs on one base model share a trainer, whenever they arrive."""

from __future__ import annotations

from pathlib import Path

import pytest

from catalog.history import queries
from catalog.jobs import commands
from catalog.states import JobState
from tests.worker_site import worker_site


def test_initial_and_joining_jobs_share_one_trainer_and_equal_solo_runs(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        rows, validation = site.upload(80), site.upload(12, seed=5)
        batch = {"hyperparameters": {"batch_size": 16}, "checkpoint_every_steps": 1000, "validation_file": validation}
        kinds = [{**batch, "max_steps": 40, "lora": {"rank": rank}, "seed": rank} for rank in (4, 8)]
        later = {**batch, "max_steps": 5, "lora": {"rank": 16}, "seed": 16}
        together = [site.submit(rows, **kind) for kind in kinds]
        site.start_worker(FAILPOINT=f"step_4:wait={site.gate('join')}")
        site.wait_for_step(4, *together)
        joiner = site.submit(rows, **later)
        site.wait_for_message("admit")
        site.gate("join").touch()

        site.wait_for_end(*together, joiner)

        packed = [*together, joiner]
        assert [site.job(job_id).state for job_id in packed] == [JobState.SUCCEEDED] * 3, site.log()
        assert len({site.job(job_id).trainer_id for job_id in packed}) == 1
        for job_id in packed:
            project_id = site.caller.project_id
            (mates,) = queries.packmates(site.db, project_id=project_id, job_id=job_id).values()
            assert set(mates) == {other for other in packed if other != job_id}
            evaluation = site.adapter(job_id).evaluation
            assert evaluation is not None
            assert evaluation["loss"] < evaluation["base_loss"]
        alone = site.submit(rows, **later)
        site.wait_for_end(alone)
        assert site.weights_digest(alone) == site.weights_digest(joiner)


@pytest.mark.slow
def test_a_job_on_a_quantized_base_has_its_own_trainer_and_is_verified(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with worker_site(tmp_path) as site:
        rows = site.upload(20)
        plain, quantized = (
            site.submit(rows, max_steps=3, optimizer={"learning_rate": 0.01}, quantization=kind)
            for kind in ("none", "nf4")
        )

        site.work_until_done()

        assert [site.job(job_id).state for job_id in (plain, quantized)] == [JobState.SUCCEEDED] * 2, site.log()
        assert site.job(plain).trainer_id != site.job(quantized).trainer_id
        assert site.weights_digest(plain) != site.weights_digest(quantized)
        adapter = site.adapter(quantized)
        assert adapter.verification["passed"]
        assert adapter.verification["max_abs_effect"] > 3 * adapter.verification["tolerance"]
        assert adapter.lineage["base"]["quantization"] == "nf4"
        machine = adapter.lineage["attempts"][-1]["machine"]
        assert machine["quantization"] == "nf4"
        assert adapter.lineage["code"]["bitsandbytes"] != "unknown"
        plain_bytes = site.adapter(plain).lineage["attempts"][-1]["machine"]["memory"]["base_bytes"]
        assert machine["memory"]["base_bytes"] < plain_bytes


def test_a_paused_job_leaves_the_trainer_and_resumes_at_its_step(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        project_id = site.caller.project_id
        job_id = site.submit(site.upload(40), checkpoint_every_steps=1000, max_steps=20)
        site.start_worker(FAILPOINT=f"step_10:wait={site.gate('pause')}")
        site.wait_for_step(10, job_id)
        commands.pause(site.db, project_id=project_id, job_id=job_id)
        site.wait_for_message("pause")

        site.gate("pause").touch()

        site.wait_until(lambda: site.job(job_id).state == JobState.PAUSED)
        commands.resume(site.db, project_id=project_id, job_id=job_id)
        site.wait_for_end(job_id)
        assert site.job(job_id).state == JobState.SUCCEEDED, site.log()
        assert site.attempts(job_id)[1].resumed_from_step == 10
        assert len(queries.metrics(site.db, project_id=project_id, job_id=job_id, kind="train")) == 20


def test_a_preempted_job_leaves_at_a_tick_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    with worker_site(
        tmp_path,
        LORRY_MAX_JOBS_PER_TRAINER="1",
        LORRY_PREEMPT_AFTER_SECONDS="0",
        LORRY_PREEMPTION_MIN_RUNTIME_SECONDS="0",
    ) as site:
        long_enough = {
            "checkpoint_every_steps": 1000,
            "max_steps": 100,
        }  # a job that is about to finish isn't preempted
        rows, same = site.upload(40), {**long_enough, "priority": "batch"}
        preempted, twin = site.submit(rows, **same), site.submit(rows, **same)
        site.start_worker(FAILPOINT=f"step_10:wait={site.gate('preempt')}")
        site.wait_for_step(10, preempted)
        urgent = site.submit(rows, max_steps=2, priority="urgent")
        site.wait_for_message("preempt")

        site.gate("preempt").touch()

        site.wait_for_end(preempted, twin, urgent)
        states = [site.job(job_id).state for job_id in (preempted, twin, urgent)]
        assert states == [JobState.SUCCEEDED] * 3, site.log()
        first, second = site.attempts(preempted)
        assert (first.reason, second.resumed_from_step) == ("preempted", 10)
        assert first.ended_at <= site.attempts(urgent)[0].started_at <= second.started_at
        assert site.weights_digest(preempted) == site.weights_digest(twin)


@pytest.mark.slow
def test_a_file_without_trainable_tokens_fails_only_its_own_job(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        good = site.submit(site.upload(12), max_steps=2)
        bad = site.submit(site.upload(12), max_steps=2, max_length=8)

        site.work_until_done()

        assert site.job(good).state == JobState.SUCCEEDED, site.log()
        assert site.job(bad).state == JobState.FAILED
        error = site.job(bad).error
        assert error is not None
        assert error["code"] == "nothing_to_learn"
        assert error["param"] == "training_file"


@pytest.mark.slow
def test_a_job_with_sample_prompts_answers_them_and_has_the_same_bytes(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        rows, validation = site.upload(20), site.upload(6, seed=5)
        fields = {"max_steps": 4, "seed": 3, "validation_file": validation}
        prompts = ["What color is the lorry?", "What color is the road?"]
        samples = {"prompts": prompts, "max_tokens": 6}
        sampled = site.submit(rows, **fields, evaluation={"every_steps": 2, "samples": samples})
        plain_job = site.submit(rows, **fields, evaluation={"every_steps": 2})

        site.work_until_done()

        assert [site.job(job_id).state for job_id in (sampled, plain_job)] == [JobState.SUCCEEDED] * 2, site.log()
        assert site.weights_digest(sampled) == site.weights_digest(plain_job)
        recorded = [event.data for event in site.events(sampled) if event.data and "samples" in event.data]
        assert [data["step"] for data in recorded] == [0, 2, 4]
        assert all([sample["prompt"] for sample in data["samples"]] == prompts for data in recorded)
        assert all(1 <= sample["num_tokens"] <= 6 for data in recorded for sample in data["samples"])
        assert not any(event.data and "samples" in event.data for event in site.events(plain_job))
