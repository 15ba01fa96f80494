"""The cache budget is never exceeded, and a job's rows are not evicted before they are read again."""

import random

from hypothesis import given
from hypothesis import strategies as st

from lora_core.engine.prefix_cache import CacheBudget

KEYS = [bytes([number]) for number in range(12)]
JOBS = ("a", "b", "c")


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.integers(1, 60), st.sampled_from(JOBS), st.booleans())))
def test_budget_is_never_exceeded_and_evicted_keys_are_reported(
    operations: list[tuple[bytes, int, str, bool]],
) -> None:
    cache, held = CacheBudget(100), dict[bytes, int]()

    for key, size, job, leaves in operations:
        if key in cache:
            cache.use(key, job)
        else:
            victims = cache.place(key, size, job)
            held |= {} if victims is None else {key: size}
            held = {key: size for key, size in held.items() if key not in (victims or {})}
        if leaves:
            cache.disown(job)

        assert {key for key in KEYS if key in cache} == set(held)
        assert cache.num_bytes == sum(held.values()) <= 100


def test_half_a_budget_hits_half_of_the_rows_in_any_order() -> None:
    cache, choose, rows = CacheBudget(50), random.Random(0), [bytes([row]) for row in range(100)]

    hits = 0
    for _ in range(5):
        hits = 0
        choose.shuffle(rows)
        for row in rows:
            if row in cache:
                hits += 1
                cache.use(row, "job")
            else:
                cache.place(row, 1, "job")

    assert hits == 50


def test_later_job_gets_an_equal_part_of_the_budget() -> None:
    cache = CacheBudget(10)
    for key in KEYS[:10]:
        cache.place(key, 1, "first")

    taken = [cache.place(bytes([100 + number]), 1, "second") for number in range(8)]

    assert taken == [{key: "first"} for key in KEYS[:5]] + [None] * 3


def test_entries_of_a_departed_job_are_evicted_first_unless_used() -> None:
    cache = CacheBudget(3)
    for key in KEYS[:3]:
        cache.place(key, 1, "gone")
    cache.disown("gone")
    cache.use(KEYS[0], "other")

    assert cache.place(KEYS[5], 2, "other") == {KEYS[1]: "", KEYS[2]: ""}
    assert KEYS[0] in cache
    assert cache.place(KEYS[6], 4, "other") is None
