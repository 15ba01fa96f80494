"""Noise on embeddings has the paper's scale, depends only on its key, and is applied only in training."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from lora_core.config import ObjectiveConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import JobEvaluated, JobStepped
from lora_core.packing.packed_batch import NoiseKey, with_noise
from tests.lora_core.scenarios import Submission, admit, config, dataset, run_alone

D = 64
KEY = NoiseKey(alpha=5.0, seed=1, step=2, slice_index=0, lengths=(40, 10))


def noise_of(key: NoiseKey) -> Tensor:
    return key.noise_tD(D, torch.device("cpu"))


def test_noise_is_uniform_within_the_bounds_of_the_paper_for_each_sequence():
    noise_tD = noise_of(KEY)

    for part, length in ((noise_tD[:40], 40), (noise_tD[40:], 10)):
        bound = 5.0 / (length * D) ** 0.5
        assert float(part.abs().max()) == pytest.approx(bound, rel=0.01)
        assert float(part.abs().max()) <= bound * 1.000001
        assert float(part.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(float(part.mean())) < bound / 10


def test_noise_has_the_scale_of_the_transformers_hook():
    torch.manual_seed(0)
    embedding = nn.Embedding(3, D)
    setattr(embedding, "neftune_noise_alpha", 5.0)  # noqa: B010 - as transformers does
    zeros_1TD = torch.zeros(1, 40, D)
    theirs = neftune_post_forward_hook(embedding, (), zeros_1TD)

    ours = with_noise(zeros_1TD, [(slice(0, 40), replace(KEY, lengths=(40,)))])

    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.05)
    assert float(ours.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.01)


@pytest.mark.parametrize("other", [{"seed": 9}, {"step": 9}, {"slice_index": 9}])
def test_noise_depends_on_seed_step_and_slice(other):
    assert torch.equal(noise_of(KEY), noise_of(KEY))
    assert not torch.equal(noise_of(KEY), noise_of(replace(KEY, **other)))


def test_other_rows_keep_the_bits_of_their_embeddings():
    y_1TD = torch.full((1, 60, D), -0.0)
    noisy = with_noise(y_1TD, [(slice(5, 55), KEY)])
    assert noisy[0, 5:55].all()
    for part in (noisy[0, :5], noisy[0, 55:]):
        assert torch.signbit(part).all()
    assert torch.signbit(y_1TD).all()


def test_training_is_noisy_and_the_validation_loss_is_not(load):
    base = load("llama")
    plain = Submission(
        config=config(num_steps=1, seed=1, learning_rate=1e-30), train=dataset(1, [20, 9]), valid=dataset(2, [15])
    )
    noisy = replace(plain, config=replace(plain.config, neftune_alpha=20.0))
    smooth = replace(plain, config=replace(plain.config, objective=ObjectiveConfig(label_smoothing=0.2)))

    jobs = {"plain": plain, "noisy": noisy, "smooth": smooth}
    outcomes = {name: run_alone(base, job).events for name, job in jobs.items()}

    first = {name: events[0] for name, events in outcomes.items()}
    assert isinstance(first["plain"], JobEvaluated)
    assert first["noisy"] == first["plain"] == first["smooth"]
    losses = {event.loss for events in outcomes.values() for event in events if isinstance(event, JobStepped)}
    assert len(losses) == 3
    engine = Engine(base, EngineConfig())
    admit(engine, "job", plain)
    assert engine._jobs["job"].next_slices([0])[0].noise is None
