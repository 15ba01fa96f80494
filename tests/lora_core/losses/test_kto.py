"""KTO equals the paper's formula and TRL's code. Its reference point covers the whole step, however slices are cut."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_core.adapter.optimizer import StepSizes
from lora_core.config import ObjectiveConfig
from lora_core.data.kto_pairs import mismatched
from lora_core.data.token_dataset import TokenDataset, rows_of_step
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadDataset, ConfigError
from lora_core.events import Event, JobEvaluated, JobStepped, Rewards
from lora_core.losses.preference import SingleAnswers, score_single
from tests.lora_core.losses.test_preference import logps_of
from tests.lora_core.scenarios import (
    Submission,
    admit,
    config,
    dataset,
    preferences,
    rated,
    run_alone,
    run_elastically,
    state_bytes,
)

KTO = ObjectiveConfig(kind="kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
TRAIN = rated(dataset(5, [9, 14, 23, 12]), "1001")


def paper_loss(ratios: Tensor, desirable: Tensor, z0: float) -> Tensor:
    """Compute λ_y - v(x, y) by equations 7 and 8 of 2402.01306, without rearranging them."""
    good = KTO.desirable_weight / (1 + torch.exp(-KTO.beta * (ratios - z0)))
    bad = KTO.undesirable_weight / (1 + torch.exp(-KTO.beta * (z0 - ratios)))
    return torch.where(desirable, KTO.desirable_weight - good, KTO.undesirable_weight - bad)


def trl_loss(logps: Tensor, reference: Tensor, kl_logps: Tensor, kl_reference: Tensor, desirable: Tensor):
    """Return (loss, metrics) of TRL's trainer with a model that gives these log probabilities."""
    from trl.trainer.kto_trainer import KTOTrainer

    def model(input_ids: Tensor, **_: object) -> SimpleNamespace:
        logps_N1 = (kl_logps if input_ids[0, 0] == 9 else logps)[:, None]
        return SimpleNamespace(log_probs=logps_N1, entropy=logps_N1, mean_logits=logps_N1)

    model.training = True  # pyright: ignore
    ids, mask = torch.ones(len(logps), 2).long(), torch.tensor([[0, 1]]).repeat(len(logps), 1)
    batch = {"label": desirable, "ref_logps": reference, "ref_KL_logps": kl_reference}
    for prefix, number in (("", 1), ("KL_", 9)):
        batch |= {f"{prefix}input_ids": number * ids, f"{prefix}attention_mask": ids, f"{prefix}completion_mask": mask}
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value),
        calculate_KL=True,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        loss_type="kto",
        beta=KTO.beta,
        desirable_weight=KTO.desirable_weight,
        undesirable_weight=KTO.undesirable_weight,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)  # pyright: ignore
    loss = KTOTrainer._compute_loss(trainer, model, batch, False)  # pyright: ignore
    return loss, trainer._metrics["train"]


def test_losses_and_slopes_equal_the_formula_of_the_paper():
    torch.manual_seed(3)
    ratios = (3 * torch.randn(8, dtype=torch.float64)).requires_grad_()
    desirable = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool()

    expected = paper_loss(ratios, desirable, 0.8)
    expected.sum().backward()

    answers = SingleAnswers(ratios_S=ratios.detach(), desirable_S=desirable, reference_point=0.8)
    found = score_single(KTO, answers)
    torch.testing.assert_close(found.loss_S, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.slopes_S, ratios.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("marks", ["101101", "111111", "000000"])
@pytest.mark.parametrize("shift", [2.0, -2.0], ids=["positive KL", "negative KL: z0 is 0"])
def test_loss_gradient_rewards_and_reference_point_equal_trl(marks, shift):
    torch.manual_seed(4)
    reference, kl_reference = -10 * torch.rand(2, 6, dtype=torch.float64)
    logps = (reference + torch.randn(6).double()).requires_grad_()
    kl_logps = kl_reference + torch.randn(6).double() + shift
    desirable = torch.tensor([mark == "1" for mark in marks])
    z0 = max(0.0, float((kl_logps - kl_reference).mean()))

    loss, metrics = trl_loss(logps, reference, kl_logps, kl_reference, desirable)
    loss.backward()

    answers = SingleAnswers(ratios_S=logps.detach() - reference, desirable_S=desirable, reference_point=z0)
    found = score_single(KTO, answers)
    assert float(found.loss_S.mean()) == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(found.slopes_S / 6, logps.grad, rtol=1e-10, atol=1e-12)
    assert metrics["kl"] == [pytest.approx(z0, rel=1e-12)]
    for side, chosen in (("chosen", desirable), ("rejected", ~desirable)):
        reported = metrics.get(f"rewards/{side}")
        assert reported == ([pytest.approx(float(found.rewards_S[chosen].mean()))] if chosen.any() else None)


def test_certain_answers_do_not_overflow_the_loss():
    ratios = torch.tensor([-5000.0, 5000.0, -5000.0, 5000.0], dtype=torch.float64)
    answers = SingleAnswers(ratios_S=ratios, desirable_S=torch.tensor([True, True, False, False]), reference_point=0.0)

    found = score_single(KTO, answers)

    assert found.loss_S.tolist() == [1.2, 0.0, 0.0, 0.7]
    assert torch.isfinite(found.slopes_S).all()


def tokens_of(data: TokenDataset) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), mask.tolist()) for ids, mask in map(data.row, range(data.num_rows))]


def test_mismatched_answers_are_rotated_by_one_with_their_labels():
    data = TokenDataset(
        input_ids=np.array([1, 2, 31, 32, 4, 51, 6, 7, 8, 91, 92, 93], np.int32),
        loss_mask=np.array([0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 0, 1], np.uint8),
        row_offsets=np.array([0, 4, 6, 12]),
    )

    others = mismatched(data, [2, 0, 1])

    assert tokens_of(others) == [
        ([6, 7, 8, 51], [0, 0, 0, 1]),
        ([1, 2, 91, 92, 93], [0, 0, 1, 0, 1]),
        ([4, 31, 32], [0, 1, 1]),
    ]


def test_mismatched_answer_is_cut_at_the_longest_row_of_the_data():
    data = TokenDataset(
        input_ids=np.arange(16, dtype=np.int32),
        loss_mask=np.array([0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1], np.uint8),
        row_offsets=np.array([0, 8, 16]),
    )

    others = mismatched(data, [0, 1])

    assert others.row_lengths().tolist() == [8, 2]
    assert tokens_of(others)[0] == ([0, 1, 2, 3, 4, 5, 6, 9], [0, 0, 0, 0, 0, 0, 0, 1])


@pytest.mark.filterwarnings("ignore")  # PEFT calls deprecated code of transformers
@pytest.mark.parametrize("slice_tokens", [1, 1024])
def test_step_uses_the_gradient_of_autograd_through_peft(load, tmp_path, slice_tokens):
    """Check the sixth step, when z0 of the whole batch is above 0.

    Most answers are desirable, so training makes all of them likelier.
    """
    from peft import PeftModel

    base = load("llama")
    settings = config(num_steps=8, batch_size=4, seed=5, objective=KTO, slice_tokens=slice_tokens)
    engine = Engine(base, EngineConfig())
    train = rated(TRAIN, "1011")
    admit(engine, "job", Submission(config=settings, train=train))
    job = engine._jobs["job"]
    while job.step < 5:
        engine.tick()
    engine.export("job", tmp_path / "adapter", base_name="tiny")
    found: list[tuple[Tensor, Rewards | None, float]] = []

    def note(sizes: StepSizes) -> list[Event]:
        assert job.unit is not None
        found.append((job.adapter.g.clone(), job._rewards(job.unit), job.tally.loss_sum / job.unit.num_terms))
        return []

    job.finish_step = note
    while not found:
        engine.tick()
    gradient, rewards, loss_found = found[0]

    order = rows_of_step(num_rows=4, batch_size=4, seed=5, step=5)
    pairs = mismatched(train, order)
    with base.untouched() as model:
        with torch.no_grad():
            reference = torch.stack([logps_of(model, train, row) for row in order])
            kl_reference = torch.stack([logps_of(model, pairs, row) for row in range(4)])
        adapted = PeftModel.from_pretrained(model, str(tmp_path / "adapter"), is_trainable=True).eval()
        with torch.no_grad():
            kl = torch.stack([logps_of(adapted, pairs, row) for row in range(4)]) - kl_reference
        z0 = max(0.0, float(kl.mean()))
        logps = torch.stack([logps_of(adapted, train, row) for row in order])
        desirable = torch.tensor([train.row_label(row) == 1 for row in order])
        loss = paper_loss(logps - reference, desirable, z0).mean()
        loss.backward()
        expected = {key: part.grad.clone() for key, part in adapted.named_parameters() if part.grad is not None}
        adapted.unload()
    assert rewards is not None
    assert z0 > 0.01
    assert rewards.kl == pytest.approx(z0, rel=1e-4)
    assert loss_found == pytest.approx(float(loss.detach()), rel=1e-4)
    for target in job.adapter.targets:
        site = job.adapter.spans[target.name]
        prefix = f"base_model.model.{target.name}.lora_"
        for span, name in ((site.a, "A"), (site.b, "B")):
            other = expected[f"{prefix}{name}.default.weight"].flatten()
            torch.testing.assert_close(gradient[span], other, rtol=5e-3, atol=2e-6)


def test_rewards_and_reference_point_are_exactly_zero_before_training(load):
    first = run_alone(load("gpt2"), preferences()["kto"]).events[0]

    assert isinstance(first, JobEvaluated)
    assert first.rewards == Rewards(chosen=0.0, rejected=0.0, margin=0.0, accuracy=0.0, kl=0.0)
    assert first.loss == pytest.approx((2 * 1.5 + 1.0) / 2 / 3, abs=1e-15)


def test_training_raises_desirable_answers_and_reports_the_rewards(load):
    job = Submission(config=config(num_steps=15, batch_size=4, objective=ObjectiveConfig(kind="kto")), train=TRAIN)

    stepped = [event for event in run_alone(load("llama"), job).events if isinstance(event, JobStepped)]

    assert stepped[0].loss == pytest.approx(0.5, abs=1e-12)
    assert all(event.rewards.kl >= 0 for event in stepped if event.rewards is not None and event.rewards.kl is not None)
    last = stepped[-1].rewards
    assert last is not None
    assert last.chosen is not None
    assert last.rejected is not None
    assert last.chosen > 0 > last.rejected
    assert last.margin == last.chosen - last.rejected
    assert last.accuracy == 1.0
    assert stepped[-1].loss < 0.35


def test_batch_without_rejected_answers_reports_no_mean_of_them(load):
    job = Submission(config=config(num_steps=2, objective=KTO), train=rated(dataset(2, [9, 14]), "11"))

    last = run_alone(load("llama"), job).events[1]

    assert isinstance(last, JobStepped)
    assert last.rewards is not None
    assert (last.rewards.rejected, last.rewards.margin) == (None, None)
    assert last.rewards.chosen is not None


def test_slicing_changes_losses_and_kl_only_by_rounding(load):
    job = preferences()["kto"]
    plain = replace(job.config, lora=replace(job.config.lora, dropout=0.0))  # dropout masks depend on the slices

    reported = [
        [
            (event.loss, event.rewards.kl)
            for event in run_alone(load("llama"), replace(job, config=replace(plain, slice_tokens=tokens))).events
            if isinstance(event, JobStepped | JobEvaluated) and event.rewards is not None
        ]
        for tokens in (1, 60, 1024)
    ]

    assert len(reported[0]) == 6
    assert max(kl for _, kl in reported[0] if kl is not None) > 0.01
    for other in reported[1:]:
        np.testing.assert_allclose(np.array(other, float), np.array(reported[0], float), atol=2e-5)


def test_every_pass_counts_for_scheduling_but_only_the_step_as_trained(load):
    job = Submission(config=config(num_steps=1, batch_size=2, objective=KTO), train=rated(dataset(2, [12, 13]), "10"))
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "job", job)

    unit, waiting = engine._jobs["job"].unit, engine._jobs["job"].waiting_tokens()
    assert unit is not None
    while not engine.idle:
        engine.tick()

    assert (unit.kind, waiting[0]) == ("evaluate", 2 * 25)  # passes of adapter and base without gradients
    assert engine._jobs["job"].served == 2 * (25 + 25)
    assert engine.job("job").progress.num_tokens == 25


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kto_job_does_not_depend_on_packmates_joins_and_leaves(load, dtype):
    base = load("llama", dtype)
    other = replace(preferences()["kto"].config, seed=7, batch_size=4, slice_tokens=25)
    jobs = {**preferences(), "more": replace(preferences()["kto"], config=other)}

    outcomes = run_elastically(base, jobs, token_budget=90, seed=1, victim="dpo", num_lanes=2)

    for name in ("kto", "more"):
        assert outcomes[name] == run_alone(base, jobs[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_job_resumed_after_any_tick_ends_with_the_same_bytes(load, tmp_path, dtype):
    """This includes ticks between the pass that measures the reference point and its step."""
    base, job = load("llama", dtype), preferences()["kto"]
    uninterrupted = run_alone(base, job)
    interrupted = Engine(base, EngineConfig(token_budget=1))
    admit(interrupted, "job", job)
    points: set[bool] = set()
    num_ticks = 0
    while not interrupted.idle:
        interrupted.tick()
        num_ticks += 1
        points.add(interrupted._jobs["job"].reference_point is not None)
        if num_ticks % 3 == 0:
            interrupted.save_checkpoint("job", tmp_path / f"{num_ticks}")

            resumed = Engine(base, EngineConfig(token_budget=300))
            admit(resumed, "job", job, resume_from=tmp_path / f"{num_ticks}")
            while not resumed.idle:
                resumed.tick()

            assert state_bytes(resumed, "job") == uninterrupted.vectors
    assert points == {True, False}
    assert state_bytes(interrupted, "job") == uninterrupted.vectors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dataset(1, [5, 6]), "must have labels"),
        (rated(dataset(1, [5, 6, 7]), "102"), "must have labels"),
        (rated(dataset(1, [5]), "1"), "one row"),
        (
            replace(rated(dataset(1, [5, 6]), "10"), loss_mask=np.array([0] * 5 + [0, 1, 1, 1, 1, 1], np.uint8)),
            "no answer",
        ),
    ],
)
def test_rows_that_are_not_labeled_answers_are_rejected(load, wrong, message):
    engine = Engine(load("llama"), EngineConfig())

    with pytest.raises(BadDataset, match=message):
        engine.admit("job", config(objective=KTO), wrong)
    with pytest.raises(BadDataset, match=message):
        engine.admit("job", config(objective=KTO), TRAIN, wrong)

    assert engine.jobs() == ()


def test_batch_of_one_answer_is_rejected():
    with pytest.raises(ConfigError, match="batch_size is 1") as caught:
        config(batch_size=1, objective=KTO)
    assert "at least 2" in caught.value.message


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
def test_invalid_weight_is_rejected(name):
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=f"objective.{name}"):
            replace(KTO, **{name: wrong})
