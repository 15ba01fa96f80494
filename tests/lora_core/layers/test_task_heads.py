"""Sequence classifiers: packed equals solo for each family, PEFT serves the export, and training equals PEFT's."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from lora_core.adapter.optimizer import learning_rate_at
from lora_core.base_model.model import load_base
from lora_core.config import ObjectiveConfig
from lora_core.data.token_dataset import TokenDataset, rows_of_step
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadAdapter, BadDataset, ConfigError, UnsupportedModel
from lora_core.events import JobEvaluated, JobStepped
from lora_core.forward.generation import Prompts
from lora_core.model_files.merge import merge_adapter
from lora_core.peft_format.verify import verify_export
from tests.lora_core.classifiers import FAMILIES, classification_jobs, classified, classifier, save
from tests.lora_core.exports import trained
from tests.lora_core.scenarios import Submission, admit, config, dataset, run_alone, run_elastically, state_bytes
from tests.tiny_models import COMMON

THREE = ObjectiveConfig(kind="classification", num_labels=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifiers")
    return {family: save(family, root / family) for family in FAMILIES}


@pytest.mark.slow_repetitions
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, "float32") for family in FAMILIES),
        ("bert", "bfloat16"),
        pytest.param("modernbert", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_packed_equals_solo_for_classifiers_and_rewards(folders, family, dtype):
    base = classifier(family, folders[family], dtype)
    jobs = classification_jobs(with_types=family == "bert")
    alone = {name: run_alone(base, job) for name, job in jobs.items()}

    packed = run_elastically(base, jobs, token_budget=4096, seed=1, victim="none", num_lanes=2)

    assert packed.keys() == jobs.keys()
    for name, outcome in packed.items():
        assert outcome.events == alone[name].events, name
        assert outcome.vectors == alone[name].vectors, name


@pytest.mark.parametrize(("family", "name"), [("bert", "three"), ("llama", "reward")])
def test_classifier_resumed_from_any_tick_ends_with_the_same_bytes(folders, tmp_path, family, name):
    base = classifier(family, folders[family])
    jobs = classification_jobs(with_types=family == "bert")
    whole = run_alone(base, jobs[name])
    engine = Engine(base, EngineConfig(job_tokens=1))
    admit(engine, "job", jobs[name])
    num_ticks = 0
    while not engine.idle:
        engine.save_checkpoint("job", tmp_path / f"{num_ticks}")
        other = Engine(base, EngineConfig(token_budget=30))
        admit(other, "packmate", jobs["many"])
        admit(other, "job", jobs[name], resume_from=tmp_path / f"{num_ticks}")
        while not other.idle:
            other.tick()
        assert state_bytes(other, "job") == whole.vectors, f"saved after tick {num_ticks}"
        engine.tick()
        num_ticks += 1
    assert num_ticks > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_classifier_is_verified_and_a_changed_head_detected(folders, tmp_path, family):
    base = classifier(family, folders[family])
    jobs = classification_jobs()
    trained(base, jobs["many"]).export("job", tmp_path / "adapter", base_name="tiny")
    before = dict(base.model.named_parameters())

    verdict = verify_export(base, tmp_path / "adapter")

    assert verdict.passed, verdict
    assert verdict.max_abs_effect > 10 * verdict.tolerance
    assert all(parameter is before[name] for name, parameter in base.model.named_parameters())
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["task_type"] == "SEQ_CLS"
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    head = f"base_model.model.{content['modules_to_save'][0]}."
    save_file({name: -part if name.startswith(head) else part for name, part in tensors.items()}, path)
    assert not verify_export(base, tmp_path / "adapter").passed


def reference_losses(model, job: Submission) -> list[float]:
    """Return the losses of PEFT in a plain loop. The model is in evaluation mode, like a base in the engine."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=job.config.optimizer.weight_decay)
    losses: list[float] = []
    for step in range(job.config.num_steps):
        rows = rows_of_step(
            num_rows=job.train.num_rows, batch_size=job.config.batch_size, seed=job.config.seed, step=step
        )
        parts = [reference_loss(model, job.train, row, job.config.objective) / len(rows) for row in rows]
        total = torch.stack(parts).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(
                step + 1, peak=job.config.optimizer.learning_rate, schedule=job.config.schedule
            )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    return losses


def reference_loss(model, train: TokenDataset, row: int, objective: ObjectiveConfig) -> torch.Tensor:
    ids = torch.from_numpy(train.row(row)[0].astype("int64"))[None]
    types = train.row_token_types(row)
    options = {} if types is None else {"token_type_ids": torch.from_numpy(types.astype("int64"))[None]}
    logits = model(input_ids=ids, **options).logits
    if objective.num_labels == 1:
        return F.mse_loss(logits[0, 0], torch.tensor(train.row_label(row)))
    return F.cross_entropy(logits, torch.tensor([int(train.row_label(row))]))


@pytest.mark.slow_repetitions
@pytest.mark.parametrize(
    ("family", "num_labels"), [*((family, 3) for family in FAMILIES), ("llama", 1), ("roberta", 1)]
)
def test_twenty_steps_of_a_classifier_equal_peft(folders, tmp_path, family, num_labels):
    base = classifier(family, folders[family])
    objective = replace(THREE, num_labels=num_labels)
    job = Submission(
        config=config(num_steps=20, batch_size=3, seed=3, learning_rate=1e-3, slice_tokens=40, objective=objective),
        train=classified(3, [12, 25, 9, 31, 17], num_labels=num_labels, with_types=family == "bert"),
    )
    engine = Engine(base, EngineConfig())
    admit(engine, "job", job)
    engine.export("job", tmp_path / "start", base_name="tiny")
    losses: list[float] = []
    while not engine.idle:
        losses += [event.loss for event in engine.tick() if isinstance(event, JobStepped)]
    engine.export("job", tmp_path / "end", base_name="tiny")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(folders[family], num_labels=num_labels)
        adapted = PeftModel.from_pretrained(model, tmp_path / "start", is_trainable=True).eval()
        expected_losses = reference_losses(adapted, job)

    trained, expected = (
        load_file(tmp_path / "end" / "adapter_model.safetensors"),
        get_peft_model_state_dict(adapted, save_embedding_layers=False),
    )
    small_squares = (
        1e-6 if num_labels == 1 else 0.0
    )  # for differences that cancel; their rounding is that of the scores
    assert losses == pytest.approx(expected_losses, rel=1e-5, abs=small_squares)
    assert losses[-1] < losses[0]
    assert trained.keys() == expected.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_evaluation_reports_loss_and_accuracy(folders):
    job = Submission(
        config=config(num_steps=25, batch_size=8, seed=3, learning_rate=1e-2, objective=THREE),
        train=classified(3, [12, 5, 9, 3, 17, 8, 6, 4], num_labels=3),
        valid=classified(3, [12, 5, 9, 3, 17, 8, 6, 4], num_labels=3),
    )

    evaluated = run_alone(classifier("bert", folders["bert"]), job).events
    first, last = [event for event in evaluated if isinstance(event, JobEvaluated)]

    assert last.token_accuracy == 1.0
    assert first.token_accuracy < 1.0
    assert last.loss < 0.5 * first.loss
    assert last.num_supervised_tokens == 8


def test_head_is_initialized_by_the_seed_of_its_job(folders):
    base = classifier("roberta", folders["roberta"])
    engine = Engine(base, EngineConfig())
    for name, seed in {"one": 1, "same": 1, "other": 2}.items():
        job = config(seed=seed, objective=THREE)
        engine.admit(name, job, classified(1, [5, 6], num_labels=3))
    one, same, other = (
        engine._jobs[name].adapter.tensors["classifier.out_proj.weight"].value for name in engine.jobs()
    )

    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert float(one.std()) == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize("center", [0.0, 0.1])
def test_reward_loss_equals_trl(folders, center):
    """Apply the formulas of trl.RewardTrainer.compute_loss to the model's rewards of each answer."""
    base = classifier("llama", folders["llama"])
    objective = ObjectiveConfig(kind="reward", center_rewards_coefficient=center)
    pairs = dataset(2, [12, 13, 20, 18])
    job = Submission(config=config(num_steps=1, objective=objective, seed=5), train=pairs)
    engine = Engine(base, EngineConfig())
    admit(engine, "job", job)
    head = engine._jobs["job"].adapter.tensors["score.weight"].value.clone()
    (stepped,) = [event for event in engine.tick() if isinstance(event, JobStepped)]

    with base.untouched() as model, torch.no_grad():
        hidden = [model.model(torch.from_numpy(pairs.row(row)[0].astype("int64"))[None]) for row in range(4)]
    chosen, rejected = (
        torch.stack([(part.last_hidden_state[0, -1] @ head.T)[0] for part in hidden[side::2]]) for side in (0, 1)
    )
    expected = -F.logsigmoid(chosen - rejected).mean() + center * torch.mean((chosen + rejected) ** 2)

    assert stepped.loss == pytest.approx(float(expected), rel=1e-5)
    assert stepped.rewards is not None
    assert stepped.rewards.margin == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)
    assert stepped.rewards.accuracy == float((chosen > rejected).float().mean())


def test_reward_training_orders_the_pairs(folders):
    job = Submission(
        config=config(num_steps=25, batch_size=4, seed=5, objective=ObjectiveConfig(kind="reward")),
        train=dataset(2, [12, 13, 20, 18, 9, 15, 30, 22]),
    )

    steps = [
        event for event in run_alone(classifier("llama", folders["llama"]), job).events if isinstance(event, JobStepped)
    ]

    assert steps[-1].rewards is not None
    assert steps[-1].rewards.accuracy == 1.0
    assert steps[-1].loss < 0.1


def test_objective_that_does_not_fit_the_base_task_is_rejected(folders, load):
    classifying = Engine(classifier("llama", folders["llama"]), EngineConfig())
    speaking = Engine(load("llama"), EngineConfig())

    with pytest.raises(ConfigError, match="needs a base model for causal-lm"):
        classifying.admit("job", config(), dataset(1, [5, 6]))
    with pytest.raises(ConfigError, match="needs a base model for sequence-classification"):
        speaking.admit("job", config(objective=THREE), classified(1, [5, 6], num_labels=3))


def test_labels_that_are_not_classes_are_rejected(folders):
    engine = Engine(classifier("llama", folders["llama"]), EngineConfig())

    with pytest.raises(BadDataset, match="no labels"):
        engine.admit("job", config(objective=THREE), dataset(1, [5, 6]))
    rows = classified(1, [5, 6], num_labels=3)
    for label in (3.0, 0.5, -1.0):
        assert rows.labels is not None
        with pytest.raises(BadDataset, match="0 to 2"):
            engine.admit("job", config(objective=THREE), replace(rows, labels=rows.labels * 0 + label))


def test_token_types_unknown_to_the_base_are_rejected(tmp_path):
    options = COMMON | FAMILIES["roberta"] | {"type_vocab_size": 1}
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("roberta", **options)).save_pretrained(tmp_path / "roberta")
    typed = classified(1, [5, 6], num_labels=3, with_types=True)
    untyped = replace(typed, token_types=typed.loss_mask * 0)
    engine = Engine(classifier("roberta", tmp_path / "roberta"), EngineConfig())

    with pytest.raises(BadDataset, match="token type 1, but the base model's largest token type is 0") as refused:
        engine.admit("job", config(objective=THREE), typed)
    with pytest.raises(BadDataset, match="token type 1"):
        engine.admit("job", config(objective=THREE, evaluate_every_steps=2), untyped, typed)

    assert "token types" in refused.value.remedy
    engine.admit("job", config(objective=THREE, num_steps=1), untyped)
    while not engine.idle:
        engine.tick()


def test_labels_and_token_types_are_read_from_their_file(tmp_path):
    from safetensors.numpy import save_file as save_arrays

    rows = classified(1, [5, 6, 9], num_labels=3, with_types=True)
    arrays = {name: getattr(rows, name) for name in ("input_ids", "loss_mask", "row_offsets", "labels", "token_types")}
    save_arrays(arrays, tmp_path / "rows.safetensors")

    read = TokenDataset.load(tmp_path / "rows.safetensors")

    assert [read.row_label(row) for row in range(3)] == [rows.row_label(row) for row in range(3)]
    save_arrays(arrays | {"token_types": arrays["token_types"] + 7}, tmp_path / "wrong.safetensors")
    with pytest.raises(BadDataset, match="token_types"):
        TokenDataset.load(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize(("family", "options"), [("distilbert", {}), ("deberta-v2", {}), ("electra", {})])
def test_families_with_unknown_head_or_attention_are_rejected_by_name(tmp_path, family, options):
    AutoConfig.for_model(family, **(COMMON | options)).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match=family) as refusal:
        load_base(tmp_path, dtype="float32", device="cpu", task="sequence-classification")

    assert "modernbert" in refusal.value.remedy


def test_checkpoint_without_the_pooler_of_a_classifier_is_rejected(tmp_path):
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **COMMON))
    model.save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match="pooler"):
        load_base(tmp_path, dtype="float32", device="cpu", task="sequence-classification")


def test_classifier_rejects_prompts(folders):
    engine = Engine(classifier("llama", folders["llama"]), EngineConfig())
    admit(engine, "job", classification_jobs()["number"])

    with pytest.raises(ConfigError, match="can't answer prompts"):
        engine.generation({"job": Prompts(prompts=((5, 6),), max_tokens=1)})


def test_quantized_classifier_is_rejected(folders):
    with pytest.raises(UnsupportedModel, match="quantized"):
        load_base(folders["llama"], dtype="float32", device="cpu", quantization="nf4", task="sequence-classification")


def test_a_classifier_is_not_merged(folders, tmp_path):
    base = classifier("llama", folders["llama"])
    trained(base, classification_jobs()["three"]).export("job", tmp_path / "adapter", base_name="tiny")

    with pytest.raises(BadAdapter, match="sequence classification head"):
        merge_adapter(tmp_path / "adapter", folders["llama"], tmp_path / "merged")
