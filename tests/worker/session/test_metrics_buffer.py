"""A job's metrics between trainer and database."""

from __future__ import annotations

import pytest

from worker.session.session_job import FLUSH_SECONDS, MAX_POINTS, Curve


def step(number: int, *, seconds: float, num_tokens: int = 100) -> dict[str, float]:
    return {
        "step": number,
        "seconds": seconds,
        "num_tokens": num_tokens,
        "loss": 1.0 / number,
        "token_accuracy": 0.5,
        "learning_rate": 1e-3,
        "grad_norm": 2.0,
    }


def test_progress_shows_the_jobs_own_speed_and_its_remaining_time() -> None:
    curve = Curve(num_steps=10, steps_per_epoch=5.0)
    for number in range(1, 5):
        curve.stepped(step(number, seconds=2.0 * number))

    assert curve.progress() == {
        "step": 4,
        "num_steps": 10,
        "epoch": 0.8,
        "loss": 0.25,
        "tokens_per_second": 50.0,
        "seconds_left": 12.0,
    }


def test_speed_is_unknown_before_two_steps() -> None:
    curve = Curve(num_steps=10)
    curve.stepped(step(1, seconds=1.0))

    assert curve.progress()["tokens_per_second"] is None
    assert curve.progress()["seconds_left"] is None


def test_points_are_due_after_a_time_or_a_number() -> None:
    curve = Curve(num_steps=1000)
    curve.stepped(step(1, seconds=0.0))
    curve.written(1, now=100.0)
    curve.stepped(step(2, seconds=0.1))

    assert not curve.is_due(100.0 + FLUSH_SECONDS / 2)
    assert curve.is_due(100.0 + FLUSH_SECONDS)
    for number in range(3, MAX_POINTS + 3):
        curve.stepped(step(number, seconds=0.1))
    assert curve.is_due(100.0)


def test_points_that_arrive_during_a_write_are_kept() -> None:
    curve = Curve(num_steps=10)
    curve.stepped(step(1, seconds=0.0))
    writing = curve.points()
    curve.stepped(step(2, seconds=0.1))

    curve.written(len(writing), now=0.0)

    assert [point["step"] for point in curve.points()] == [2]


@pytest.mark.parametrize(
    ("losses", "began", "risen"),
    [
        ([4.0] * 6 + [17.0] * 5, None, (4.0, 17.0)),
        ([4.8, 9.0, 14.0, 18.0, 19.0, 20.0, 19.9, 19.95], None, (4.8, 19.37)),
        ([4.0] * 5 + [5.0] * 5, None, None),
        ([2.0, 17.0], None, (2.0, 17.0)),
        ([2.0, 2.9], None, None),
        ([2.0], None, None),
        ([4.0] * 6 + [4.5] * 5, None, None),
        ([4.0] * 8 + [10.0, 1.0, 1.0], None, None),
        ([17.0] * 6 + [4.0] * 5, None, None),
        ([], None, None),
        ([4.0] * 5, (1, 2.0), (2.0, 4.0)),
        ([4.0] * 6 + [17.0] * 5, (1, 16.0), None),
        ([17.0], (1, 2.0), (2.0, 17.0)),
        ([], (1, 2.0), None),
    ],
    ids=[
        "risen",
        "leapt in eight steps",
        "a little in ten steps",
        "leapt in two steps",
        "a harder second batch",
        "one step",
        "a little",
        "one hard batch",
        "fallen",
        "no step",
        "risen since an earlier attempt",
        "fallen since an earlier attempt",
        "one step of this attempt",
        "no step of this attempt",
    ],
)
def test_a_loss_that_ends_clearly_above_its_start_is_detected(
    losses: list[float], began: tuple[int, float] | None, risen: tuple[float, float] | None
) -> None:
    curve = Curve(num_steps=100)

    for number, loss in enumerate(losses, start=40):
        curve.stepped(step(number, seconds=float(number)) | {"loss": loss})

    on_record = began or ((40, losses[0]) if losses else None)
    assert curve.risen(on_record) == (risen and pytest.approx(risen))
