"""Losses of pairs and rewards compared with TRL's own code: methods of its trainers run on logits of the tests.

test_kto.py does the same for KTO.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from lora_core.config import ObjectiveConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.forward.classification import score_segment, slice_scores
from lora_core.losses.preference import Answers, score_pairs
from lora_core.packing.packed_batch import Graded
from tests.lora_core.classifiers import classifier
from tests.lora_core.losses.test_preference import DPO, IPO, ORPO, SIMPO, SMOOTHED
from tests.lora_core.scenarios import Submission, admit, config, dataset

NUM_PAIRS, NUM_TOKENS, VOCAB = 3, 9, 13
ANSWERS = [(3, 9), (2, 7), (4, 8), (5, 9), (2, 4), (6, 9)]
"""First token and end of each answer, the chosen answers before the rejected ones."""
ACCELERATOR = SimpleNamespace(
    device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value, unwrap_model=lambda model: model
)


def as_batches(answers: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids, attention mask, mask of the answers), chosen answers first."""
    ids = torch.randint(1, VOCAB, (len(answers), NUM_TOKENS))
    places = torch.arange(NUM_TOKENS)
    attended = torch.stack([places < end for _, end in answers]).long()
    answered = torch.stack([(places >= start) & (places < end) for start, end in answers]).long()
    return ids * attended, attended, answered


def token_logps(logits: Tensor, ids: Tensor, answered: Tensor) -> Tensor:
    """Return log probabilities of the tokens of answers, and 0 for other tokens."""
    logps = F.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    return logps * answered[:, 1:]


def paired(values: Tensor) -> Tensor:
    return values.view(2, NUM_PAIRS).T


def as_dpo_of_trl(objective: ObjectiveConfig, logps: Tensor, reference: Tensor, masks: tuple[Tensor, Tensor]):
    """Return (loss, metrics) of TRL's trainer if its model gives `logps` to tokens. `reference` contains sums."""
    from trl.trainer.dpo_trainer import DPOTrainer

    attended, answered = masks
    model = lambda **_: SimpleNamespace(  # noqa: E731
        log_probs=logps, entropy=logps, mean_logits=logps, is_top1=torch.ones_like(logps).bool()
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[objective.loss_type],
        loss_weights=[1.0],
        beta=objective.beta,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = reference.chunk(2)
    batch = {"input_ids": attended, "attention_mask": attended, "completion_mask": answered}
    batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = DPOTrainer._compute_loss(trainer, model, batch, False)  # pyright: ignore
    return loss, {name: value[0] for name, value in trainer._metrics["train"].items()}


@pytest.mark.parametrize("objective", [DPO, IPO], ids=["sigmoid", "ipo"])
def test_dpo_loss_gradient_and_rewards_equal_trl(objective):
    torch.manual_seed(1)
    ids, attended, answered = as_batches(ANSWERS)
    logits = torch.randn(2 * NUM_PAIRS, NUM_TOKENS, VOCAB, dtype=torch.float64)
    logps = token_logps(logits, ids, answered).requires_grad_()
    reference = logps.detach().sum(1) + torch.randn(2 * NUM_PAIRS).double()

    loss, metrics = as_dpo_of_trl(objective, logps, reference, (attended, answered))
    loss.backward()

    lengths = answered.sum(1).double()
    given = Answers(
        logps_P2=paired(logps.detach().sum(1)), reference_P2=paired(reference), num_labels_P2=paired(lengths)
    )
    found = score_pairs(objective, given)
    assert float(found.loss_P.mean()) == pytest.approx(float(loss.detach()), rel=1e-12)
    of_tokens = found.slopes_P2.T.reshape(-1, 1).expand_as(logps) / NUM_PAIRS
    torch.testing.assert_close(of_tokens, logps.grad, rtol=1e-10, atol=1e-14)
    if objective is DPO:  # for IPO, TRL reports sums, and the engine the means that its loss compares
        reported = {side: metrics[f"rewards/{side}"] for side in ("chosen", "rejected", "margins")}
        chosen, rejected = (float(side) for side in found.rewards_P2.mean(0))
        assert reported == pytest.approx(
            {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}, rel=1e-12
        )


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_label_smoothing_equals_trl():
    """TRL's DPO trainer no longer smooths labels of this loss. Its CPO trainer does, and gets log ratios here."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    torch.manual_seed(2)
    ratios = (3 * torch.randn(NUM_PAIRS, 2, dtype=torch.float64)).requires_grad_()
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR,
        alpha=0.0,
        loss_type="sigmoid",
        beta=SMOOTHED.beta,
        label_smoothing=SMOOTHED.label_smoothing,
    )
    losses, _, _ = CPOTrainer.cpo_loss(trainer, *ratios.unbind(1))  # pyright: ignore
    losses.sum().backward()

    given = Answers(
        logps_P2=ratios.detach(), reference_P2=torch.zeros(NUM_PAIRS, 2).double(), num_labels_P2=ratios.detach()
    )
    found = score_pairs(SMOOTHED, given)
    torch.testing.assert_close(found.loss_P, losses.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.slopes_P2, ratios.grad, rtol=1e-10, atol=1e-14)


def as_trainer_of_trl(trainer_class, logits: Tensor, batches: tuple[Tensor, Tensor, Tensor], **options):
    """Return (loss, metrics) of a trainer without a reference, whose model gives `logits`."""
    ids, attended, answered = batches
    labels = torch.where(answered == 1, ids, -100)
    batch: dict[str, Tensor] = {}
    for side, part in (("chosen", slice(NUM_PAIRS)), ("rejected", slice(NUM_PAIRS, None))):
        batch |= {f"{side}_input_ids": ids[part], f"{side}_attention_mask": attended[part]}
        batch |= {f"{side}_labels": labels[part]}
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        padding_value=0,
        pad_token_id=0,
        concatenated_inputs=trainer_class.concatenated_inputs,
        get_batch_logps=trainer_class.get_batch_logps,
        **options,
    )
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_class, name):
            setattr(trainer, name, getattr(trainer_class, name).__get__(trainer))
    return trainer_class.get_batch_loss_metrics(trainer, lambda *_, **__: SimpleNamespace(logits=logits), batch)


def scored_logits(objective: ObjectiveConfig, logits: Tensor, batches: tuple[Tensor, Tensor, Tensor]):
    """Return the engine's (mean loss, gradient with respect to the logits, means of log probabilities)."""
    ids, _, answered = batches
    logits = logits.detach().clone().requires_grad_()
    logps, lengths = token_logps(logits, ids, answered).sum(1), answered.sum(1).double()
    given = Answers(logps_P2=paired(logps.detach()), reference_P2=None, num_labels_P2=paired(lengths))
    found = score_pairs(objective, given)
    (paired(logps) * found.slopes_P2).sum().div(NUM_PAIRS).backward()
    return float(found.loss_P.mean()), logits.grad, paired((logps / lengths).detach())


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_simpo_loss_and_gradient_equal_trl():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    torch.manual_seed(3)
    batches = as_batches(ANSWERS)
    logits = (2 * torch.randn(2 * NUM_PAIRS, NUM_TOKENS, VOCAB, dtype=torch.float64)).requires_grad_()
    options = {"alpha": 0.0, "cpo_alpha": 0.0, "label_smoothing": 0.0, "loss_type": "simpo"}

    loss, _ = as_trainer_of_trl(CPOTrainer, logits, batches, beta=SIMPO.beta, simpo_gamma=SIMPO.gamma, **options)
    loss.backward()

    found, gradient, _ = scored_logits(SIMPO, logits, batches)
    assert found == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_orpo_odds_ratio_equals_trl():
    """TRL adds the mean cross-entropy of all tokens of the batch, including prompts.

    The engine adds that of each pair's answer, as in equations 2 and 6 of the paper.
    """
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    torch.manual_seed(4)
    batches = as_batches(ANSWERS)
    logits = 2 * torch.randn(2 * NUM_PAIRS, NUM_TOKENS, VOCAB, dtype=torch.float64)

    loss, metrics = as_trainer_of_trl(ORPOTrainer, logits, batches, beta=ORPO.beta)

    found, _, means_P2 = scored_logits(ORPO, logits, batches)
    odds_of_trl = float(loss) - metrics["nll_loss"]
    assert found + float(means_P2[:, 0].mean()) == pytest.approx(odds_of_trl, rel=2e-6)  # TRL computes it in fp32
    assert metrics["rewards/margins"] == pytest.approx(ORPO.beta * float(means_P2.diff().neg().mean()), rel=2e-6)


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_orpo_equals_trl_with_one_token_prompts_and_equal_answer_lengths():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    torch.manual_seed(5)
    batches = as_batches([(1, 8), (1, 8), (1, 8), (1, 3), (1, 9), (1, 6)])
    logits = (2 * torch.randn(2 * NUM_PAIRS, NUM_TOKENS, VOCAB, dtype=torch.float64)).requires_grad_()

    loss, _ = as_trainer_of_trl(ORPOTrainer, logits, batches, beta=ORPO.beta)
    loss.backward()

    found, gradient, _ = scored_logits(ORPO, logits, batches)
    assert found == pytest.approx(float(loss.detach()), rel=2e-6)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-5, atol=1e-7)


def as_rewards_of_trl(model, batch: dict[str, Tensor], center: float) -> tuple[Tensor, dict[str, float]]:
    from trl.trainer.reward_trainer import RewardTrainer

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        args=SimpleNamespace(center_rewards_coefficient=center or None),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss: Any = RewardTrainer.compute_loss(trainer, model, batch)  # pyright: ignore
    return loss, {name: value[0] for name, value in trainer._metrics["train"].items()}


@pytest.mark.parametrize("center", [0.0, 0.1])
def test_reward_loss_gradient_and_margin_equal_trl(center):
    torch.manual_seed(6)
    rewards = torch.randn(2 * NUM_PAIRS, dtype=torch.float64).requires_grad_()
    batch = {"attention_mask": torch.ones(2 * NUM_PAIRS, 2)}

    loss, metrics = as_rewards_of_trl(lambda **_: SimpleNamespace(logits=rewards[:, None]), batch, center)
    loss.backward()

    own = rewards.detach().clone().requires_grad_()
    objective = ObjectiveConfig(kind="reward", center_rewards_coefficient=center)
    graded = Graded(objective=objective, first=0, last=2 * NUM_PAIRS, weight=1 / NUM_PAIRS, labels=())
    summed, numbers = score_segment(paired(own).reshape(-1, 1), graded)
    scores = slice_scores(numbers)
    (summed * graded.weight).backward()
    assert float(summed.detach()) / NUM_PAIRS == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(own.grad, rewards.grad, rtol=1e-12, atol=1e-14)
    assert scores.rewards is not None
    assert (scores.rewards.chosen - scores.rewards.rejected) / NUM_PAIRS == pytest.approx(metrics["margin"], rel=1e-12)
    assert scores.rewards.num_ordered / NUM_PAIRS == pytest.approx(metrics["accuracy"])


@pytest.mark.filterwarnings("ignore")  # PEFT calls deprecated code of transformers
@pytest.mark.parametrize("slice_tokens", [1, 1024])
def test_reward_step_uses_the_gradient_of_trl_through_peft(tmp_path, slice_tokens):
    """TRL's batch is padded on the right, chosen answers first. The engine's is not, and can be cut into slices."""
    from peft import PeftModel

    base = classifier("llama", tmp_path / "base")
    pairs = dataset(7, [9, 14, 23, 12])
    pairs.input_ids[pairs.input_ids == 0] = 5  # 0 is the padding token
    objective = ObjectiveConfig(kind="reward", center_rewards_coefficient=0.1)
    job = Submission(config=config(num_steps=3, seed=5, objective=objective, slice_tokens=slice_tokens), train=pairs)
    engine = Engine(base, EngineConfig())
    admit(engine, "job", job)
    while engine.progress("job")[0] < 1:
        engine.tick()
    engine.export("job", tmp_path / "adapter", base_name="tiny")
    adapter = engine._jobs["job"].adapter
    gradients: list[dict[str, Tensor]] = []

    def note(_unit):
        found = {f"{target.name}.lora_A": adapter.sites[target.name].grad_a_RD for target in adapter.targets}
        found |= {f"{target.name}.lora_B": adapter.sites[target.name].grad_b_OR for target in adapter.targets}
        gradients.append(
            {name: part.clone() for name, part in (found | {"score": adapter.tensors["score.weight"].grad}).items()}
        )
        return []

    engine._jobs["job"].finish_step = note  # pyright: ignore
    while not gradients:
        engine.tick()

    rows = [torch.from_numpy(pairs.row(row)[0].astype("int64")) for row in (0, 2, 1, 3)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "adapter"), is_trainable=True).eval()
    loss, _ = as_rewards_of_trl(adapted, {"input_ids": ids, "attention_mask": (ids > 0).long()}, 0.1)
    loss.backward()
    expected = {name: part.grad for name, part in adapted.named_parameters() if part.grad is not None}
    assert len(expected) == len(gradients[0])
    for name, gradient in gradients[0].items():
        layer, _, matrix = name.partition(".lora_")
        full = f"base_model.model.{layer}." + (
            f"lora_{matrix}.default.weight" if matrix else "modules_to_save.default.weight"
        )
        torch.testing.assert_close(gradient, expected[full], rtol=2e-3, atol=1e-5, msg=name)
