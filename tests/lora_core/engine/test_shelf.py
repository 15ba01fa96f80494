"""Accounts of a budget: never more than it, and a job's rows aren't thrown out before they are read again."""

import random

from hypothesis import given
from hypothesis import strategies as st

from lora_core.engine.prefix_cache import CacheBudget

KEYS = [bytes([number]) for number in range(12)]
JOBS = ("a", "b", "c")


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.integers(1, 60), st.sampled_from(JOBS), st.booleans())))
def test_a_shelf_never_holds_more_than_its_budget_and_says_what_went(
    asked: list[tuple[bytes, int, str, bool]],
) -> None:
    shelf, held = CacheBudget(100), dict[bytes, int]()

    for key, size, job, leaves in asked:
        if key in shelf:
            shelf.use(key, job)
        else:
            victims = shelf.place(key, size, job)
            held |= {} if victims is None else {key: size}
            held = {key: size for key, size in held.items() if key not in (victims or {})}
        if leaves:
            shelf.leave(job)

        assert {key for key in KEYS if key in shelf} == set(held)
        assert shelf.num_bytes == sum(held.values()) <= 100


def test_half_a_budget_keeps_half_of_what_is_read_once_an_epoch_in_any_order() -> None:
    shelf, choose, rows = CacheBudget(50), random.Random(0), [bytes([row]) for row in range(100)]

    hits = 0
    for _ in range(5):
        hits = 0
        choose.shuffle(rows)
        for row in rows:
            if row in shelf:
                hits += 1
                shelf.use(row, "job")
            else:
                shelf.place(row, 1, "job")

    assert hits == 50


def test_a_job_that_comes_later_gets_as_much_and_no_more() -> None:
    shelf = CacheBudget(10)
    for key in KEYS[:10]:
        shelf.place(key, 1, "first")

    taken = [shelf.place(bytes([100 + number]), 1, "second") for number in range(8)]

    assert taken == [{key: "first"} for key in KEYS[:5]] + [None] * 3


def test_what_a_job_leaves_goes_first_unless_somebody_uses_it() -> None:
    shelf = CacheBudget(3)
    for key in KEYS[:3]:
        shelf.place(key, 1, "gone")
    shelf.leave("gone")
    shelf.use(KEYS[0], "other")

    assert shelf.place(KEYS[5], 2, "other") == {KEYS[1]: "", KEYS[2]: ""}
    assert KEYS[0] in shelf
    assert shelf.place(KEYS[6], 4, "other") is None
