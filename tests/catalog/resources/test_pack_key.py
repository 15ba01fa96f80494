"""Rules for jobs that train together: packs, joiners and pack keys."""

from __future__ import annotations

from dataclasses import replace

from catalog.resources.memory import JOB_TOKENS, TICK_TOKENS
from catalog.resources.pack_key import pack_key, precision_of, quantization_of, weights_of
from catalog.scheduling.ordering import QueueEntry, order
from catalog.scheduling.packing import choose_anchor, choose_joiners, choose_pack
from catalog.scheduling.snapshot import PATIENCE_SECONDS, Candidate, Capacity
from tests.catalog.scheduling.test_fairness_over_days import candidate

ROOM = Capacity(max_jobs=4, memory_bytes_free=100)


def other(job_id: str, created_at: float = 0, priority: int = 1, trainer_bytes: int = 10) -> Candidate:
    return candidate(
        job_id,
        created_at,
        priority=priority,
        base_digest="c",
        pack_key="c:bfloat16:causal-lm",
        trainer_bytes=trainer_bytes,
    )


def entries(*candidates: Candidate, now: float = 10) -> list[QueueEntry]:
    return order(candidates, now)


def packed(*candidates: Candidate, capacity: Capacity = ROOM, now: float = 10) -> list[str]:
    return [choice.entry.candidate.job_id for choice in choose_pack(entries(*candidates, now=now), capacity)]


def test_activation_checkpointing_lets_a_large_job_fit() -> None:
    long, short = replace(candidate("long"), own_bytes=95, saved_bytes=60), candidate("short", 1)
    roomy = replace(ROOM, recomputes=True)

    assert packed(long, short) == ["short"]
    assert packed(long, short, capacity=roomy) == ["long", "short"]
    assert joined(long, capacity=replace(ROOM, memory_bytes_free=90)) == []
    assert joined(long, capacity=replace(roomy, memory_bytes_free=35)) == ["long"]


def joined(*candidates: Candidate, capacity: Capacity = ROOM, now: float = 10, worker_bytes: int = 100) -> list[str]:
    chosen, _ = choose_joiners(
        entries(*candidates, now=now), capacity, "b:bfloat16:causal-lm", worker_bytes=worker_bytes
    )
    return [choice.entry.candidate.job_id for choice in chosen]


def test_first_job_is_the_anchor_and_matching_jobs_fill_the_pack() -> None:
    assert packed(candidate("a"), other("x", 1), candidate("b", 2), candidate("c", 3)) == ["a", "b", "c"]


def test_pack_is_limited_by_job_count_and_memory() -> None:
    waiting = [candidate(f"j{i}", i) for i in range(9)]

    assert packed(*waiting) == ["j0", "j1", "j2", "j3"]
    assert packed(*waiting, capacity=Capacity(max_jobs=0, memory_bytes_free=100)) == []
    assert packed(*waiting, capacity=Capacity(max_jobs=4, memory_bytes_free=12)) == ["j0", "j1"]
    assert packed(*waiting, capacity=Capacity(max_jobs=4, memory_bytes_free=10)) == []


def test_packmate_that_does_not_fit_yields_to_a_smaller_one() -> None:
    large = candidate("large", 1, own_bytes=95)

    assert packed(candidate("a"), large, candidate("b", 2)) == ["a", "b"]


def test_resident_base_is_preferred_only_within_its_class_and_patience() -> None:
    capacity = Capacity(max_jobs=1, memory_bytes_free=100, resident_key="b:bfloat16:causal-lm")
    resident = candidate("resident", 5)

    assert packed(other("x"), resident, capacity=capacity, now=10) == ["resident"]
    assert packed(other("x"), resident, capacity=capacity, now=PATIENCE_SECONDS) == ["x"]
    assert packed(other("x", priority=0), resident, capacity=capacity, now=10) == ["x"]


def test_job_for_the_resident_trainer_still_needs_memory_for_a_tick() -> None:
    """The free memory counts the resident base model as free, as for jobs that would unload it."""
    needs_eleven = candidate("a", trainer_bytes=10, own_bytes=1)

    def taken(memory_bytes_free: int) -> list[str]:
        capacity = Capacity(max_jobs=1, memory_bytes_free=memory_bytes_free, resident_key=needs_eleven.pack_key)
        return packed(needs_eleven, capacity=capacity)

    assert taken(11) == ["a"]
    assert taken(10) == []


def test_same_base_in_another_dtype_is_not_resident() -> None:
    """Five bytes are free and the bfloat16 base model holds ten. In float32 it needs 22 bytes with its tick."""
    capacity = Capacity(max_jobs=1, memory_bytes_free=15, resident_key="b:bfloat16:causal-lm")
    large = candidate("large", 5, pack_key="b:float32:causal-lm", trainer_bytes=22)
    small = candidate("small", 5, pack_key="b:float32:causal-lm", trainer_bytes=10)

    assert packed(large, capacity=capacity) == []
    assert packed(small, capacity=capacity) == ["small"]
    assert packed(other("x"), small, capacity=capacity, now=10) == ["x"]
    assert packed(other("x"), candidate("same", 5), capacity=capacity, now=10) == ["same"]


def test_isolated_job_neither_has_nor_becomes_a_packmate() -> None:
    suspect = candidate("suspect", 0, is_suspect=True)

    assert packed(suspect, candidate("a", 1)) == ["suspect"]
    assert packed(candidate("a"), candidate("suspect", 1, is_suspect=True), candidate("b", 2)) == ["a", "b"]
    assert joined(candidate("suspect", 0, is_suspect=True), candidate("a", 1)) == ["a"]


def test_joiners_pass_a_job_for_another_base_only_within_its_patience() -> None:
    assert joined(other("x"), candidate("a", 1)) == ["a"]
    assert joined(candidate("a"), other("x", 1), candidate("b", 2), now=PATIENCE_SECONDS + 1) == ["a"]


def test_job_that_never_fits_the_worker_does_not_drain_its_trainer() -> None:
    huge = other("huge", trainer_bytes=1000)

    assert joined(huge, candidate("a", 1), now=PATIENCE_SECONDS + 1) == ["a"]


def test_large_job_is_not_passed_by_smaller_joiners_forever() -> None:
    large = candidate("large", own_bytes=80)
    capacity = Capacity(max_jobs=4, memory_bytes_free=50)

    assert joined(large, candidate("a", 1), capacity=capacity) == ["a"]
    assert joined(large, candidate("a", 1), capacity=capacity, now=PATIENCE_SECONDS + 1) == []
    assert joined(candidate("a"), large, capacity=capacity, now=PATIENCE_SECONDS + 1) == ["a"]
    assert joined(large, candidate("a", 1), capacity=capacity, now=PATIENCE_SECONDS + 1, worker_bytes=60) == ["a"]


def test_no_job_joins_into_memory_freed_by_a_preemption() -> None:
    urgent = candidate("urgent", 5, priority=0, own_bytes=80)
    preempting = replace(urgent, preemption_requested_at=8)
    capacity = Capacity(max_jobs=4, memory_bytes_free=50)

    assert joined(urgent, candidate("a"), capacity=capacity) == ["a"]
    assert joined(preempting, candidate("a"), capacity=capacity) == []
    assert joined(preempting, candidate("a"), capacity=capacity, worker_bytes=60) == ["a"]
    assert joined(preempting, candidate("a"), capacity=replace(capacity, memory_bytes_free=90)) == ["urgent", "a"]


def test_resident_base_is_not_preferred_over_a_preempting_job() -> None:
    capacity = Capacity(max_jobs=1, memory_bytes_free=100, resident_key="b:bfloat16:causal-lm")
    urgent, resident = other("urgent", priority=0), candidate("resident", 5, priority=0)
    preempting = replace(urgent, preemption_requested_at=8)
    third = replace(other("third", priority=0), place=-1, queued_at=-1, pack_key="d:bfloat16:causal-lm")

    assert packed(urgent, resident, capacity=capacity) == ["resident"]
    assert packed(preempting, resident, capacity=capacity) == ["urgent"]
    assert packed(third, preempting, resident, capacity=capacity) == ["third"]
    assert packed(third, candidate("first", -0.5, priority=0), preempting, capacity=capacity) == ["first"]
    assert packed(replace(preempting, trainer_bytes=1000), resident, capacity=capacity) == ["resident"]


def test_choices_have_a_reason() -> None:
    waiting = entries(candidate("a"), candidate("b", 1))

    reasons = [(choice.role, choice.reason) for choice in choose_pack(waiting, ROOM)]

    assert reasons[0] == ("anchor", "first job in the queue that fits this worker")
    assert reasons[1] == ("packmate", "same base model and dtype as the anchor, and fits next to it")
    assert choose_anchor([], ROOM) is None


def test_pack_key_contains_the_precision() -> None:
    assert precision_of(pack_key("d", "float32")) == "float32"
    assert precision_of(pack_key("sha256:d", "bfloat16")) == "bfloat16"


def test_pack_key_contains_the_quantization() -> None:
    keys = [pack_key("d", "float32", quantization) for quantization in ("none", "nf4", "int8")]

    assert len(set(keys)) == 3
    assert [quantization_of(key) for key in keys] == ["none", "nf4", "int8"]
    assert [precision_of(key) for key in keys] == ["float32"] * 3
    assert [weights_of(key) for key in keys] == ["float32", "nf4 with float32", "int8 with float32"]


def test_pack_key_without_quantization_keeps_the_older_format() -> None:
    assert pack_key("d", "float32", "none") == "d:float32:causal-lm"


def test_gpu_tick_memory_is_counted_slice_by_slice_up_to_its_limit() -> None:
    waiting = [candidate(f"j{i:02}", i, own_bytes=1, slice_bytes=5, trainer_bytes=10) for i in range(12)]

    def sizes(memory_bytes_free: int) -> tuple[int, int]:
        cpu = Capacity(max_jobs=12, memory_bytes_free=memory_bytes_free)
        gpu = Capacity(max_jobs=12, memory_bytes_free=memory_bytes_free, tick_tokens=TICK_TOKENS["cuda"])
        return len(packed(*waiting, capacity=cpu)), len(packed(*waiting, capacity=gpu))

    assert TICK_TOKENS == {"cpu": JOB_TOKENS, "cuda": 8 * JOB_TOKENS}
    assert sizes(10) == (0, 0)
    assert sizes(11) == (1, 1)
    assert sizes(17) == (7, 2)
    assert sizes(53) == (12, 8)
    assert sizes(57) == (12, 12)


def test_running_jobs_count_toward_the_tick_size() -> None:
    waiting = [candidate(f"j{i}", i, own_bytes=1, slice_bytes=5) for i in range(4)]

    def joiners(num_jobs: int) -> int:
        capacity = Capacity(max_jobs=4, memory_bytes_free=8, num_jobs=num_jobs, tick_tokens=TICK_TOKENS["cuda"])
        return len(joined(*waiting, capacity=capacity))

    assert [joiners(num_jobs) for num_jobs in (0, 1, 7, 8)] == [2, 1, 3, 4]


def test_slices_count_as_the_kernels_of_the_trainer_keep_them_if_they_keep_more() -> None:
    waiting = [candidate(f"j{i}", i, own_bytes=1, slice_bytes=5) for i in range(4)]

    def joiners(slice_bytes: int) -> int:
        capacity = Capacity(
            max_jobs=4, memory_bytes_free=12, num_jobs=1, tick_tokens=TICK_TOKENS["cuda"], slice_bytes=slice_bytes
        )
        return len(joined(*waiting, capacity=capacity))

    assert [joiners(slice_bytes) for slice_bytes in (0, 5, 7, 12)] == [2, 2, 1, 0]
