"""Scheduling is fair in tokens, starves no job, and fills the token budget."""

from collections import Counter

from lora_core.config import Kind
from lora_core.engine.fair_queue import ReadySlice, select_slices, widen


def ready_slice(job: str, num_tokens: int, served: int = 0, kind: Kind = "train") -> ReadySlice:
    return ReadySlice(job=job, kind=kind, num_tokens=num_tokens, served=served)


def names(slices: list[ReadySlice]) -> list[str]:
    return [ready.job for ready in slices]


def test_all_slices_are_selected_if_all_fit():
    assert names(select_slices([ready_slice("a", 10), ready_slice("b", 20)], token_budget=30)) == ["a", "b"]


def test_empty_queue_selects_nothing():
    assert select_slices([], token_budget=10) == []


def test_slice_above_the_budget_runs_alone():
    assert names(select_slices([ready_slice("big", 99), ready_slice("small", 1, served=5)], token_budget=10)) == ["big"]


def test_least_served_job_is_first_and_smaller_slices_fill_the_budget():
    waiting = [
        ready_slice("a", 40, served=90),
        ready_slice("b", 70, served=0),
        ready_slice("c", 60, served=10),
        ready_slice("d", 25, served=80),
    ]
    assert names(select_slices(waiting, token_budget=100)) == ["b", "d"]


def test_an_evaluation_is_never_mixed_with_training():
    waiting = [
        ready_slice("a", 10, served=1),
        ready_slice("b", 10, served=0, kind="evaluate"),
        ready_slice("c", 10, 2, "evaluate"),
    ]
    assert names(select_slices(waiting, token_budget=100)) == ["b", "c"]


def test_large_and_small_jobs_get_similar_tokens_over_time():
    served = Counter({"large": 0, "small": 0, "tiny": 0})
    sizes = {"large": 900, "small": 200, "tiny": 30}
    for _ in range(3000):
        waiting = [ready_slice(job, sizes[job], served[job]) for job in served]
        for chosen in select_slices(waiting, token_budget=1000):
            served[chosen.job] += chosen.num_tokens
    # tiny runs in every tick where it fits next to others, so it is limited to one slice per tick
    assert min(served["large"], served["small"]) > 0.5 * max(served["large"], served["small"])
    assert served["tiny"] >= 30 * 2500


def test_tick_is_widened_up_to_the_limits_of_a_job():
    waiting = [ReadySlice(job="a", kind="train", num_tokens=10, served=0, further=(10,) * 9)]

    assert widen(waiting, token_budget=1000, job_tokens=1000) == [(10,) * 10]
    assert widen(waiting, token_budget=1000, job_tokens=45) == [(10,) * 4]
    assert widen(waiting, token_budget=1000, job_tokens=1000, job_slices=3) == [(10,) * 3]
