"""Losses of pairs: the papers' formulas, their gradients, and their use in the engine."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.config import ObjectiveConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadDataset, ConfigError
from lora_core.events import JobEvaluated, JobStepped
from lora_core.losses.preference import Answers, PairScores, score_pairs
from tests.lora_core.scenarios import Submission, admit, config, dataset, preferences, run_alone

DPO = ObjectiveConfig(kind="dpo", beta=0.3)
SMOOTHED = ObjectiveConfig(kind="dpo", beta=0.3, label_smoothing=0.2)
IPO = ObjectiveConfig(kind="dpo", loss_type="ipo", beta=0.25)
ORPO = ObjectiveConfig(kind="orpo", beta=0.4)
SIMPO = ObjectiveConfig(kind="simpo", beta=2.0, gamma=1.2)
OBJECTIVES = {"dpo": DPO, "smoothed": SMOOTHED, "ipo": IPO, "orpo": ORPO, "simpo": SIMPO}


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def paper_loss(name: str, logps: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """Compute each loss as its paper writes it, without rearranging the formula."""
    objective = OBJECTIVES[name]
    (w, x), (ref_w, ref_x), (len_w, len_x) = logps.T, reference.T, lengths.T
    beta = objective.beta
    if name == "dpo":  # 2305.18290, equation 7
        return -torch.log(sigmoid(beta * (w - ref_w) - beta * (x - ref_x)))
    if name == "smoothed":
        z = beta * (w - ref_w) - beta * (x - ref_x)
        return -0.8 * torch.log(sigmoid(z)) - 0.2 * torch.log(sigmoid(-z))
    if name == "ipo":  # 2310.12036, equation 17, with means over labels
        return ((w - ref_w) / len_w - (x - ref_x) / len_x - 1 / (2 * beta)) ** 2
    if name == "orpo":  # 2403.07691, equations 3 to 7
        p_w, p_x = torch.exp(w / len_w), torch.exp(x / len_x)
        ratio = (p_w / (1 - p_w)) / (p_x / (1 - p_x))
        return -w / len_w - beta * torch.log(sigmoid(torch.log(ratio)))
    return -torch.log(sigmoid(beta * w / len_w - beta * x / len_x - objective.gamma))  # 2405.14734, equation 6


def answers() -> Answers:
    torch.manual_seed(3)
    lengths = torch.randint(1, 30, (6, 2)).double()
    logps = -torch.rand(6, 2, dtype=torch.float64) * lengths
    return Answers(logps_P2=logps, reference_P2=logps + torch.randn(6, 2).double(), num_labels_P2=lengths)


def scored(objective: ObjectiveConfig, given: Answers) -> PairScores:
    return score_pairs(objective, given)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_slopes_equal_the_formulas_of_the_papers(name):
    given = answers()
    logps = given.logps_P2.clone().requires_grad_()
    assert given.reference_P2 is not None

    expected = paper_loss(name, logps, given.reference_P2, given.num_labels_P2)
    expected.sum().backward()

    found = scored(OBJECTIVES[name], given)
    torch.testing.assert_close(found.loss_P, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.slopes_P2, logps.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_certain_answers_do_not_overflow_the_loss(name):
    given = Answers(
        logps_P2=torch.tensor([[0.0, -5000.0], [-5000.0, 0.0]], dtype=torch.float64),
        reference_P2=torch.zeros(2, 2, dtype=torch.float64),
        num_labels_P2=torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64),
    )

    found = scored(OBJECTIVES[name], given)

    assert torch.isfinite(found.loss_P).all()
    assert torch.isfinite(found.slopes_P2).all()


def logps_of(model, train, row: int) -> Tensor:
    ids, mask = (torch.from_numpy(part.copy()).long() for part in train.row(row))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
    logps = F.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
    return logps[mask[1:].bool()].sum()


@pytest.mark.filterwarnings("ignore")  # PEFT calls deprecated code of transformers
@pytest.mark.parametrize("name", OBJECTIVES)
def test_step_uses_the_gradient_of_autograd_through_peft(load, tmp_path, name):
    """Check the second step, because the first one makes the adapter differ from the base."""
    from peft import PeftModel

    base = load("llama")
    train = dataset(5, [9, 14, 23, 12])
    job = Submission(config=config(num_steps=3, seed=5, objective=OBJECTIVES[name]), train=train)
    engine = Engine(base, EngineConfig())
    admit(engine, "job", job)
    engine.tick()
    engine.export("job", tmp_path / "adapter", base_name="tiny")
    adapter = engine._jobs["job"].adapter
    gradients: list[Tensor] = []
    engine._jobs["job"].finish_step = lambda _sizes: gradients.append(adapter.g.clone()) or []  # pyright: ignore
    engine.tick()

    lengths = torch.tensor([[int(train.row(2 * pair + side)[1].sum()) for side in (0, 1)] for pair in (0, 1)])
    with base.untouched() as model:
        with torch.no_grad():
            reference = torch.stack([logps_of(model, train, index) for index in range(4)]).view(2, 2)
        adapted = PeftModel.from_pretrained(model, str(tmp_path / "adapter"), is_trainable=True).eval()
        logps = torch.stack([logps_of(adapted, train, index) for index in range(4)]).view(2, 2)
        loss = paper_loss(name, logps, reference, lengths.double()).mean()
        loss.backward()
        expected = {key: part.grad.clone() for key, part in adapted.named_parameters() if part.grad is not None}
        adapted.unload()
    for target in adapter.targets:
        site = adapter.sites[target.name]
        prefix = f"base_model.model.{target.name}.lora_"
        torch.testing.assert_close(site.grad_a_RD, expected[f"{prefix}A.default.weight"], rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(site.grad_b_OR, expected[f"{prefix}B.default.weight"], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapter_and_reference_are_bitwise_equal_before_training(load, family):
    job = preferences()["dpo"]

    first = run_alone(load(family), job).events[0]

    assert isinstance(first, JobEvaluated)
    assert first.rewards is not None
    assert first.loss == pytest.approx(math.log(2), abs=1e-15)
    assert (first.rewards.margin, first.rewards.chosen, first.rewards.accuracy) == (0.0, 0.0, 0.0)


def test_training_widens_the_margin_and_reports_it(load):
    job = Submission(
        config=config(num_steps=12, batch_size=4, objective=ObjectiveConfig(kind="dpo", beta=0.1)),
        train=dataset(2, [12, 13, 20, 18, 9, 15, 30, 22]),
    )

    stepped = [event for event in run_alone(load("llama"), job).events if isinstance(event, JobStepped)]

    assert stepped[0].loss == pytest.approx(math.log(2), abs=1e-12)
    last = stepped[-1]
    assert last.rewards is not None
    assert last.loss < 0.5 * math.log(2)
    assert last.rewards.accuracy == 1.0
    assert last.rewards.chosen is not None
    assert last.rewards.rejected is not None
    assert last.rewards.margin == pytest.approx(last.rewards.chosen - last.rewards.rejected)


def test_supervised_jobs_report_no_rewards(load):
    events = run_alone(load("llama"), Submission(config=config(num_steps=1), train=dataset(1, [5, 6]))).events

    assert all(event.rewards is None for event in events if isinstance(event, JobStepped))


def test_pair_is_never_split_by_small_slices(load):
    job = Submission(
        config=config(num_steps=1, batch_size=3, slice_tokens=1, objective=DPO),
        train=dataset(2, [12, 13, 20, 18, 9, 15]),
    )
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "job", job)

    unit = engine._jobs["job"].unit

    assert unit is not None
    assert sorted(unit.slices) == [(0, 1), (2, 3), (4, 5)]


@pytest.mark.parametrize(("objective", "passes"), [(DPO, 2), (ORPO, 1)])
def test_reference_pass_counts_for_scheduling_but_not_as_trained(load, objective, passes):
    job = Submission(config=config(num_steps=1, batch_size=1, objective=objective), train=dataset(2, [12, 13]))
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "job", job)

    num_tokens = engine._jobs["job"].waiting_tokens()[0]
    engine.tick()

    assert num_tokens == passes * 25
    assert engine._jobs["job"].served == passes * 25
    assert engine.job("job").progress.num_tokens == 25


def test_slicing_changes_the_loss_only_by_rounding(load):
    pairs = dataset(2, [12, 13, 20, 18, 9, 15, 30, 22])
    losses = [
        [
            event.loss
            for event in run_alone(
                load("llama"),
                Submission(
                    config=config(num_steps=3, batch_size=4, slice_tokens=tokens, objective=SMOOTHED), train=pairs
                ),
            ).events
            if isinstance(event, JobStepped)
        ]
        for tokens in (1, 60, 1024)
    ]

    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)


def test_rows_that_are_not_pairs_are_rejected(load):
    engine = Engine(load("llama"), EngineConfig())

    with pytest.raises(BadDataset, match="3 rows can't be grouped into pairs"):
        engine.admit("job", config(objective=DPO), dataset(1, [5, 6, 7]))

    assert engine.jobs() == ()


@pytest.mark.parametrize(
    "wrong", [{"kind": "ppo"}, {"beta": 0.0}, {"label_smoothing": 0.5}, {"loss_type": "hinge"}, {"gamma": -1.0}]
)
def test_invalid_objective_is_rejected(wrong):
    with pytest.raises(ConfigError, match=f"objective.{next(iter(wrong))}"):
        ObjectiveConfig(**wrong)


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("gamma", 1.0, ["supervised", "dpo", "orpo", "reward", "kto"]),
        ("loss_type", "ipo", ["supervised", "orpo", "simpo", "classification"]),
        ("label_smoothing", 0.1, ["orpo", "simpo", "classification", "reward"]),
        ("center_rewards_coefficient", 0.1, ["supervised", "dpo", "classification", "kto"]),
        ("desirable_weight", 2.0, ["supervised", "dpo", "orpo"]),
        ("undesirable_weight", 0.5, ["simpo", "reward", "classification"]),
    ],
)
def test_field_that_an_objective_does_not_use_is_rejected(field, value, others):
    for kind in others:
        with pytest.raises(ConfigError, match=f"objective.{field}") as caught:
            ObjectiveConfig(kind=kind, **{field: value})
        assert f"omitted: {kind} does not use it" in caught.value.message


def test_ipo_loss_rejects_label_smoothing():
    with pytest.raises(ConfigError, match="label_smoothing") as caught:
        ObjectiveConfig(kind="dpo", loss_type="ipo", label_smoothing=0.1)
    assert "ipo does not use it" in caught.value.message
