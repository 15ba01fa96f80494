"""End to end without fakes: the real openai client, the API server, a worker, a trainer and a verified adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import openai
import pytest

from catalog.tables.storage import Artifact
from tests import tiny_base
from tests.system.api_process import Service, api_process
from tests.worker_site import BASE, PEPPER, WorkerSite, worker_site


def test_openai_client_trains_a_model_and_deletes_it(tmp_path: Path) -> None:
    with (
        worker_site(tmp_path) as site,
        api_process(site.settings.data_dir, pepper=PEPPER) as service,
        service.client() as client,
    ):
        site.start_worker()
        rows = tiny_base.write_chat(tmp_path / "train.jsonl", 40)
        training = client.files.create(file=rows, purpose="fine-tune")
        validation_rows = tiny_base.write_chat(tmp_path / "valid.jsonl", 8, seed=5)
        validation = client.files.create(file=validation_rows, purpose="fine-tune")
        assert client.files.wait_for_processing(training.id).status == "processed"

        job = client.fine_tuning.jobs.create(
            model=BASE,
            training_file=training.id,
            validation_file=validation.id,
            suffix="colors",
            seed=3,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 10}},
            },
            extra_body={"lora": {"rank": 4}, "checkpoint_every_steps": 5},
        )
        mate = submit_dora_with_patterns(client, training.id)
        site.wait_for_end(job.id, mate)

        done = client.fine_tuning.jobs.retrieve(job.id)
        assert done.status == "succeeded", site.log()
        assert done.trained_tokens
        assert done.fine_tuned_model is not None
        assert done.fine_tuned_model.startswith(f"ft:{BASE}:default:colors:")
        losses = train_losses(client, job.id)
        assert losses[0] < losses[-1]  # the newest is listed first
        checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
        assert [checkpoint.step_number for checkpoint in checkpoints] == [10, 5]
        assert all(checkpoint.metrics.train_loss for checkpoint in checkpoints)
        assert client.models.retrieve(done.fine_tuned_model).object == "model"
        assert_adapter_is_verified(service, site, done.fine_tuned_model)
        assert_dora_with_patterns_was_trained(service, site, mate)
        assert client.models.delete(done.fine_tuned_model).deleted
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(done.fine_tuned_model)
        assert client.files.delete(training.id).deleted


@pytest.mark.slow
def test_openai_client_trains_with_dpo_on_pairs_of_answers(tmp_path: Path) -> None:
    with (
        worker_site(tmp_path) as site,
        api_process(site.settings.data_dir, pepper=PEPPER) as service,
        service.client() as client,
    ):
        pairs = client.files.create(file=tiny_base.write_pairs(tmp_path / "pairs.jsonl", 24), purpose="fine-tune")
        validation_rows = tiny_base.write_pairs(tmp_path / "valid.jsonl", 4, seed=5)
        validation = client.files.create(file=validation_rows, purpose="fine-tune")
        chats = client.files.create(file=tiny_base.write_chat(tmp_path / "chats.jsonl", 4), purpose="fine-tune")
        numbers: Any = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 20, "beta": 0.5}
        requested: Any = {"type": "dpo", "dpo": {"hyperparameters": numbers}}
        with pytest.raises(openai.BadRequestError) as refused:
            client.fine_tuning.jobs.create(model=BASE, training_file=chats.id, method=requested)
        assert (refused.value.code, refused.value.param) == ("wrong_file_kind", "training_file")

        job = client.fine_tuning.jobs.create(
            model=BASE, training_file=pairs.id, validation_file=validation.id, seed=3, method=requested
        )
        site.work_until_done()

        done = client.fine_tuning.jobs.retrieve(job.id)
        assert done.status == "succeeded", site.log()
        assert done.method is not None
        assert done.method.dpo is not None
        assert done.method.dpo.hyperparameters is not None
        assert done.method.dpo.hyperparameters.beta == 0.5
        losses = train_losses(client, job.id)
        assert losses[0] < math.log(2) - 0.05  # at first the adapter equals its reference, and the loss is ln 2
        metrics = [event.data for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"]
        rewards = [data["train_rewards"] for data in metrics if isinstance(data, dict) and "train_rewards" in data]
        assert rewards[0]["margin"] > 0
        assert rewards[0]["accuracy"] > 0.5
        curve: Any = client.get(f"/fine_tuning/jobs/{job.id}/metrics?kind=valid", cast_to=object)
        assert curve["data"][0]["rewards"]["margin"] == 0.0
        assert curve["data"][-1]["rewards"]["margin"] > 0
        assert done.fine_tuned_model is not None
        assert_adapter_is_verified(service, site, done.fine_tuned_model)
        (adapter,) = site.adapters()
        assert adapter.evaluation is not None
        assert adapter.evaluation["rewards"]["accuracy"] > 0.5
        assert "perplexity" not in adapter.evaluation


@pytest.mark.slow
def test_openai_client_sees_which_file_has_no_trainable_tokens(tmp_path: Path) -> None:
    with (
        worker_site(tmp_path) as site,
        api_process(site.settings.data_dir, pepper=PEPPER) as service,
        service.client() as client,
    ):
        messages = [
            {"role": "user", "content": "why " * tiny_base.MAX_POSITIONS},
            {"role": "assistant", "content": "because"},
        ]
        row = json.dumps({"messages": messages}) + "\n"
        file = client.files.create(file=("long.jsonl", row.encode() * 3), purpose="fine-tune")

        job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
        site.work_until_done()

        failed = client.fine_tuning.jobs.retrieve(job.id)
        assert failed.status == "failed"
        assert failed.error is not None
        assert failed.error.param == "training_file"
        assert failed.error.code == "nothing_to_learn"


def submit_dora_with_patterns(client: openai.OpenAI, training_file: str) -> str:
    shape = {"rank": 4, "use_dora": True, "rank_pattern": {"q_proj": 8, "down_proj": 2}, "layers_to_transform": [1]}
    refused = {"lora": shape | {"rank_pattern": {"down_prj": 2}}}
    with pytest.raises(openai.BadRequestError, match="Did you mean down_proj"):
        client.fine_tuning.jobs.create(model=BASE, training_file=training_file, extra_body=refused)
    requested = {"lora": shape | {"init_lora_weights": "olora"}, "optimizer": {"lora_plus_ratio": 4}, "max_steps": 4}
    return client.fine_tuning.jobs.create(model=BASE, training_file=training_file, extra_body=requested).id


def assert_dora_with_patterns_was_trained(service: Service, site: WorkerSite, job_id: str) -> None:
    """PEFT has verified the adapter, and its configuration has the requested shape. OLoRA doubles the rank."""
    job, adapter = site.job(job_id), site.adapter(job_id)
    assert_adapter_is_verified(service, site, adapter.name)
    assert adapter.num_parameters == job.adapter_parameters
    with site.db.read() as session:
        files = session.get_one(Artifact, adapter.artifact).files
    digest = next(file["digest"] for file in files if file["path"] == "adapter_config.json")
    config = json.loads(b"".join(site.store.open_blob(digest)))
    assert (config["use_dora"], config["layers_to_transform"]) == (True, [1])
    assert (config["r"], config["rank_pattern"]) == (8, {"q_proj": 16, "down_proj": 4})


def train_losses(client: openai.OpenAI, job_id: str) -> list[float]:
    """Return the losses in the job's events, the newest first."""
    metrics = [event.data for event in client.fine_tuning.jobs.list_events(job_id) if event.type == "metrics"]
    return [data["train_loss"] for data in metrics if isinstance(data, dict) and "train_loss" in data]


def assert_adapter_is_verified(service: Service, site: WorkerSite, name: str) -> None:
    """Assert that the trainer verified the adapter before the job succeeded, and that the store verifies it now."""
    (adapter,) = (adapter for adapter in site.adapters() if adapter.name == name)
    assert adapter.verification["passed"] is True
    assert adapter.verification["max_abs_diff"] <= adapter.verification["tolerance"]
    with service.client() as client:
        answer = client.post(f"/adapters/{adapter.id}/verify", cast_to=object)
    assert isinstance(answer, dict)
    assert answer["passed"] is True
    assert answer["problems"] == []
