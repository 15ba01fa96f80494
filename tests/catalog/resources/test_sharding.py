"""What the devices of a group hold of a base, and which jobs are trained on a divided one; numbers by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from catalog.resources import memory, sharding
from catalog.resources.gpus import CARDS, MIB
from catalog.resources.sharding import NEVER, Demand, DeviceGroup, ShardingStrategy, Wanted
from catalog.scheduling.ordering import order
from catalog.scheduling.packing import choose_joiners, choose_pack
from catalog.scheduling.preemption import Holder, Training
from catalog.scheduling.preemption import choose as choose_who_leaves
from catalog.scheduling.snapshot import Candidate, Capacity, Policy, WorkerService
from tests.catalog.scheduling.test_fairness_over_days import candidate

GB = 10**9
RESERVE = 600 * MIB + 1024 * MIB  # CUDA itself, and what GPUs talk through: 1,702,887,424


def llama(*, hidden: int, keys: int, inner: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """As lora_core describes one whose head is not tied to its embeddings."""
    shapes = {
        "q_proj": [hidden, hidden],
        "k_proj": [keys, hidden],
        "v_proj": [keys, hidden],
        "o_proj": [hidden, hidden],
        "gate_proj": [inner, hidden],
        "up_proj": [inner, hidden],
        "down_proj": [hidden, inner],
    }
    block = sum(rows * columns for rows, columns in shapes.values()) + 2 * hidden
    return {
        "linear_shapes": {name: [shape, layers] for name, shape in shapes.items()},
        "num_parameters": layers * block + 2 * vocabulary * hidden + hidden,
        "blocks": {"count": layers, "num_parameters": layers * block, "largest_parameters": block},
        "vocab_size": vocabulary,
        "num_layers": layers,
        "hidden_size": hidden,
    }


# 7B (Llama 2): a block has 4 · 4096² + 3 · 4096 · 11008 + 2 · 4096 = 202,383,360 numbers, 32 of them 6,476,267,520;
# with embeddings and head of 32000 · 4096 each and a norm of 4096 in all 6,738,415,616.
SEVEN = llama(hidden=4096, keys=4096, inner=11008, layers=32, vocabulary=32000)
# 70B (Llama 3): a block has 2 · 8192² + 2 · 8192 · 1024 + 3 · 8192 · 28672 + 2 · 8192 = 855,654,400 numbers, 80 of them
# 68,452,352,000; with embeddings and head of 128256 · 8192 each and a norm of 8192 in all 70,553,706,496.
SEVENTY = llama(hidden=8192, keys=1024, inner=28672, layers=80, vocabulary=128256)


def demand(description: dict[str, Any], precision: str = "bfloat16", *, own: int = GB) -> Demand:
    """Of a job that takes `own` beside what its trainer needs."""
    divisible, gathered = sharding.block_bytes(description, precision)
    whole = memory.trainer_bytes(description, precision) + own
    return Demand(whole_bytes=whole, shardable_bytes=divisible, gathered_bytes=gathered)


def gpus(number: int, gigabytes: int, wanted: Wanted = "auto", *, host: int = 0) -> DeviceGroup:
    """host: bytes of its memory that a base may take."""
    card = next(card for card in CARDS if card.gigabytes == gigabytes)
    return DeviceGroup(kind="cuda", num_devices=number, bytes_of_each=card.memory_bytes, wanted=wanted, host_bytes=host)


def test_the_numbers_that_the_cases_stand_on() -> None:
    assert (SEVEN["num_parameters"], SEVEN["blocks"]["largest_parameters"]) == (6_738_415_616, 202_383_360)
    assert (SEVENTY["num_parameters"], SEVENTY["blocks"]["largest_parameters"]) == (70_553_706_496, 855_654_400)
    # A tick of 1,024 tokens keeps 2 numbers of each input: of 70B 1024 · 2 · 80 · (6 · 8192 + 28672) of 2 bytes.
    # Its logits are 2 · 256 · 128256 numbers of 4 bytes. Beside the weights' 141,107,412,992 bytes that is:
    assert memory.trainer_bytes(SEVENTY, "bfloat16") == 141_107_412_992 + 25_501_368_320 + 262_668_288
    # Of 7B 1024 · 2 · 32 · (6 · 4096 + 11008) numbers, and logits of 2 · 256 · 32000.
    assert memory.trainer_bytes(SEVEN, "bfloat16") == 13_476_831_232 + 4_664_066_048 + 65_536_000
    # Three blocks are whole at one time: the one that computes, and the next one twice.
    assert sharding.block_bytes(SEVENTY, "bfloat16") == (136_904_704_000, 3 * 1_711_308_800)


SEVENTY_ON_EIGHT = 166_871_449_600 + 5 * GB - 136_904_704_000 + 17_113_088_000 + 5_133_926_400 + RESERVE
# With the shares in the host's memory: three whole blocks, and the half of the next one that comes from there.
SEVENTY_FROM_HOST = 166_871_449_600 + 5 * GB - 136_904_704_000 + 5_133_926_400 + 855_654_400 + RESERVE
SEVEN_IN_FP32_ON_FOUR = 36_347_330_560 + GB - 25_905_070_080 + 6_476_267_520 + 2_428_600_320 + RESERVE


@pytest.mark.parametrize(
    ("group", "needs", "strategy", "needed", "fits"),
    [
        # One GPU has nobody to divide with: 171.9 GB are needed of 85.0.
        (gpus(1, 80), demand(SEVENTY, own=5 * GB), "replicated", 171_871_449_600, False),
        # An eighth of the blocks, three whole ones, and what no block holds: 58.9 GB of 85.0.
        (gpus(8, 80), demand(SEVENTY, own=5 * GB), "fsdp2", SEVENTY_ON_EIGHT, True),
        # Half of the blocks is 68.5 GB: 110.3 GB of 85.0.
        (gpus(2, 80), demand(SEVENTY, own=5 * GB), "fsdp2", SEVENTY_ON_EIGHT + 51_339_264_000, False),
        # 7B whole with all that is taken beside it: 20.9 GB of 23.8.
        (gpus(2, 24), demand(SEVEN), "replicated", 19_206_433_280 + RESERVE, True),
        # The same in fp32 is 37.3 GB: a quarter of its blocks leaves 22.1.
        (gpus(4, 24), demand(SEVEN, "float32"), "fsdp2", SEVEN_IN_FP32_ON_FOUR, True),
        (gpus(2, 24), demand(SEVEN, "float32"), "fsdp2", SEVEN_IN_FP32_ON_FOUR + 6_476_267_520, False),
        # What fits whole is divided where an operator says so, and what doesn't stays whole.
        (gpus(2, 24, "zero3"), demand(SEVEN), "zero3", 19_206_433_280 - 6_476_267_520 + 1_214_300_160 + RESERVE, True),
        (gpus(8, 80, "replicated"), demand(SEVENTY, own=5 * GB), "replicated", 171_871_449_600 + RESERVE, False),
        # A job that needs whole weights is trained where they are, and nowhere where all is divided.
        (gpus(8, 80), replace(demand(SEVENTY), shardable_bytes=0), "replicated", 167_871_449_600 + RESERVE, False),
        (gpus(2, 24, "fsdp2"), replace(demand(SEVEN), shardable_bytes=0), "fsdp2", NEVER, False),
        # Where half of the blocks is too much, the host's memory has them: 42.7 GB of 47.9, and 136.9 of the host's.
        (gpus(2, 48, host=136_904_704_000), demand(SEVENTY, own=5 * GB), "fsdp2_offload", SEVENTY_FROM_HOST, True),
        # The host lacks a byte, so it stays divided, which doesn't fit: 110.3 GB of 47.9.
        (
            gpus(2, 48, host=136_904_703_999),
            demand(SEVENTY, own=5 * GB),
            "fsdp2",
            SEVENTY_ON_EIGHT + 51_339_264_000,
            False,
        ),
        # What fits divided is not moved, however large the host is; nor does one GPU move anything.
        (gpus(8, 80, host=10**12), demand(SEVENTY, own=5 * GB), "fsdp2", SEVENTY_ON_EIGHT, True),
        (gpus(1, 80, host=10**12), demand(SEVENTY, own=5 * GB), "replicated", 171_871_449_600, False),
        # Where an operator says so all is moved, and nothing is trained that the host has no room for.
        (
            gpus(2, 24, "zero3_offload", host=20 * GB),
            demand(SEVEN),
            "zero3_offload",
            19_206_433_280 - 12_952_535_040 + 1_214_300_160 + 202_383_360 + RESERVE,
            True,
        ),
        (gpus(2, 24, "fsdp2_offload", host=12 * GB), demand(SEVEN), "fsdp2_offload", NEVER, False),
        # On a CPU processes share the memory, and nothing is set aside.
        (DeviceGroup(num_devices=2, bytes_of_each=20 * GB), demand(SEVEN), "replicated", 19_206_433_280, True),
        # The host's memory is the same there: nothing moves by itself, and where it is told to, nothing is saved.
        (DeviceGroup(num_devices=2, bytes_of_each=12 * GB), demand(SEVEN), "fsdp2", 13_944_465_920, False),
        (
            DeviceGroup(num_devices=2, bytes_of_each=15 * GB, wanted="fsdp2_offload"),
            demand(SEVEN),
            "fsdp2_offload",
            13_944_465_920 + 202_383_360,
            True,
        ),
    ],
)
def test_how_a_group_holds_a_base_and_what_each_device_needs(
    group: DeviceGroup, needs: Demand, strategy: str, needed: int, fits: bool
) -> None:
    assert (group.strategy(needs), group.needed_bytes(needs)) == (strategy, needed)
    assert (group.needed_bytes(needs) <= group.bytes_of_each) == fits


def test_a_base_is_divided_from_the_first_byte_on_that_does_not_fit() -> None:
    fits = demand(SEVEN)
    just = DeviceGroup(num_devices=2, bytes_of_each=fits.whole_bytes)

    assert just.strategy(fits) == "replicated"
    assert replace(just, bytes_of_each=fits.whole_bytes - 1).strategy(fits) == "fsdp2"


def test_the_parts_on_a_device_are_what_it_is_reckoned_to_need() -> None:
    needs, group = demand(SEVENTY), gpus(8, 80)
    rest = needs.whole_bytes - needs.shardable_bytes

    divided, offloaded = group.block_parts(needs, "sharded"), group.block_parts(needs, "offloaded")

    assert divided == {"base_share": 17_113_088_000, "gathered_blocks": 5_133_926_400}
    # An eighth of a block of 1,711,308,800 bytes is on its way.
    assert offloaded == {"base_share": 0, "gathered_blocks": 5_133_926_400, "coming_share": 213_913_600}
    assert rest + sum(divided.values()) == group.allocated_bytes(needs, "sharded")
    assert rest + sum(offloaded.values()) == group.allocated_bytes(needs, "offloaded")


def test_a_base_may_take_of_its_host_what_is_left_beside_the_trainers() -> None:
    # 0.9 · 10^12, and 2^32 for each of eight processes.
    assert sharding.host_bytes(10**12, num_processes=8) == 865_640_261_632
    assert sharding.host_bytes(10**9, num_processes=8) == 0


def test_a_base_is_moved_to_the_host_from_the_first_byte_on_that_does_not_fit_divided() -> None:
    needs = demand(SEVEN)
    just = DeviceGroup(num_devices=2, bytes_of_each=13_944_465_920, host_bytes=10**12)
    assert just.strategy(needs) == "fsdp2"
    assert replace(just, bytes_of_each=13_944_465_919).strategy(needs) == "fsdp2_offload"


def test_what_would_hold_a_job_is_told_by_number_and_size() -> None:
    found = sharding.would_fit(demand(SEVENTY, own=5 * GB))
    *told, from_host = [(fit.num_devices, fit.card.gigabytes, fit.host_bytes) for fit in found]
    assert told == [(1, 180, 0), (2, 141, 0), (4, 80, 0)], "eight of 48 GB would need 58.9 of 47.8"
    assert from_host == (2, 48, 136_904_704_000)
    sentence = (
        "It would fit on one GPU with 180 GB, or on 2 GPUs with 141 GB each, or on 4 GPUs with 80 GB each, or on 2 "
        "GPUs with 48 GB each and 136.9 GB of host memory for the base model."
    )
    assert sharding.would_fit_sentence(sharding.would_fit(demand(SEVENTY, own=5 * GB))) == sentence
    whole = replace(demand(SEVENTY, own=5 * GB), shardable_bytes=0)
    assert [(fit.num_devices, fit.card.gigabytes) for fit in sharding.would_fit(whole)] == [(1, 180)]
    assert "no common GPU" in sharding.would_fit_sentence(sharding.would_fit(Demand(whole_bytes=10**13)))


def test_a_job_that_fits_nowhere_is_told_why() -> None:
    large = demand(SEVENTY, own=5 * GB)
    whole, bar = replace(large, shardable_bytes=0), "DoRA needs the full weights"

    assert sharding.nowhere([(gpus(1, 80), large), (gpus(8, 80), large)], None) is None
    told = sharding.nowhere([(gpus(1, 80), large)], None)
    assert told == "The job needs about 171.9 GB, but the largest worker has 85.0 GB."
    assert "Sharding across the 2 devices" in str(sharding.nowhere([(gpus(2, 80), large)], None))
    assert str(sharding.nowhere([(gpus(8, 80), whole)], bar)).endswith(f"has 85.0 GB. {bar}.")
    assert bar not in str(sharding.nowhere([(gpus(1, 80), whole)], bar)), "one GPU divides nothing"
    forced = str(sharding.nowhere([(gpus(2, 24, "fsdp2"), replace(demand(SEVEN), shardable_bytes=0))], bar))
    assert forced == (
        f"The largest worker always shards base models across its devices (LORRY_STRATEGY is fsdp2). {bar}."
    )


def test_a_job_that_the_host_has_no_room_for_is_told_what_would_do() -> None:
    large = demand(SEVENTY, own=5 * GB)

    told = sharding.nowhere([(gpus(2, 48, host=100 * GB), large)], None)
    assert told == (
        "Sharding across the 2 devices of the largest worker needs about 110.3 GB per device, but the smallest device "
        "has 47.9 GB. With shards in host memory it would need about 42.7 GB per device and about 136.9 GB of host "
        "memory, of which a base model may use 100.0 GB."
    )
    small = str(sharding.nowhere([(gpus(2, 24, host=10 * GB), large)], None))
    assert small.endswith("the smallest device has 23.8 GB."), "it would not fit from there either"
    forced = sharding.nowhere([(gpus(2, 48, "fsdp2_offload", host=100 * GB), large)], None)
    assert forced == (
        "Sharding across the 2 devices of the largest worker would need about 136.9 GB of host memory, of which a base "
        "model may use 100.0 GB."
    )
    narrow = sharding.nowhere([(gpus(2, 24, host=200 * GB), large)], None)
    assert narrow == (
        "Sharding across the 2 devices of the largest worker, with shards in host memory, needs about 42.7 GB per "
        "device, but the smallest device has 23.8 GB."
    )


@pytest.mark.parametrize(
    ("lora", "quantization", "description", "told"),
    [
        ({}, "none", SEVEN, None),
        ({"init_lora_weights": "gaussian"}, "none", SEVEN, None),
        ({"use_dora": True}, "none", SEVEN, "DoRA needs"),
        ({"init_lora_weights": "pissa_niter_4"}, "none", SEVEN, "pissa_niter_4 decomposes"),
        ({}, "nf4", SEVEN, "quantized to nf4"),
        ({}, "none", {}, "has counted its blocks"),
        ({}, "none", {"blocks": {"count": 0}}, "no list of blocks"),
    ],
)
def test_what_bars_a_job_from_a_divided_base(
    lora: dict[str, Any], quantization: str, description: dict[str, Any], told: str | None
) -> None:
    found = sharding.hindrance(lora, quantization, description)
    assert found is None if told is None else told in str(found)


def test_why_a_group_holds_a_base_as_it_does_is_said_with_numbers() -> None:
    small, large = demand(SEVEN), demand(SEVENTY, own=5 * GB)
    assert sharding.reason(gpus(1, 24), small) == "The worker has one device, which holds the full base model."
    assert sharding.reason(gpus(2, 24), small) == (
        "Each device holds a full replica of the base model: the job needs about 20.9 GB per device, and the smallest "
        "of 2 devices has 23.8 GB."
    )
    assert sharding.reason(gpus(8, 80), large) == (
        "A full replica of the base model would need about 173.6 GB per device, and the smallest of 8 devices has "
        "85.0 GB. Sharding across 8 devices needs about 58.9 GB per device."
    )
    assert sharding.reason(gpus(2, 48, host=200 * GB), large) == (
        "Sharding the base model across the devices would need about 110.3 GB per device, and the smallest of 2 "
        "devices has 47.9 GB. Sharding across 2 devices with shards in host memory (about 136.9 GB in total) needs "
        "about 42.7 GB per device."
    )
    told = sharding.reason(gpus(2, 24, "zero3_offload", host=200 * GB), small)
    assert told.startswith(
        "LORRY_STRATEGY is zero3_offload. Sharding across 2 devices with shards in host memory (about"
    )
    assert "LORRY_STRATEGY is fsdp2. Sharding across 2" in sharding.reason(gpus(2, 24, "fsdp2"), small)
    assert "LORRY_STRATEGY is replicated" in sharding.reason(gpus(2, 24, "replicated"), small)


@pytest.mark.parametrize("wanted", ["auto", "fsdp2"])
def test_no_base_is_divided_over_nodes_whatever_the_leaders_own_group_is(wanted: Wanted) -> None:
    large, alone = Demand(whole_bytes=150 * 10**9, shardable_bytes=140 * 10**9), gpus(4, 80, wanted)
    of_gang = replace(alone, gang="hall")

    assert (alone.strategy(large), of_gang.strategy(large)) == ("fsdp2", "replicated")
    assert of_gang.needed_bytes(large) == large.whole_bytes + alone.reserve_bytes
    assert "gang hall holds a full replica of the base model" in sharding.reason(of_gang, large)
    assert replace(gpus(1, 80), gang="hall").reserve_bytes == alone.reserve_bytes, "NCCL has its buffers there too"


def test_a_worker_is_known_by_what_it_said_and_an_older_one_holds_whole_bases() -> None:
    said = {"kind": "cuda", "indices": [0, 1], "num_processes": 2, "strategy": "auto", "host_bytes": 7}
    assert sharding.reported_group([said], 5) == DeviceGroup(kind="cuda", num_devices=2, bytes_of_each=5, host_bytes=7)
    old = {"kind": "cuda", "indices": [0, 1]}
    assert sharding.reported_group([old], 5).shards_when == "never"
    assert sharding.reported_group([], 5) == DeviceGroup(bytes_of_each=5, wanted="replicated")


# Two devices of 100 bytes. A base of 60, of which 40 are blocks, and 5 gathered: divided it takes 20 + 20 + 5.
PAIR = DeviceGroup(num_devices=2, bytes_of_each=100)
ROOM = Capacity(max_jobs=4, memory_bytes_free=100, group=PAIR)


def sized(job_id: str, created_at: float = 0, *, own: int, divisible: int = 40) -> Candidate:
    sizes: dict[str, Any] = {"own_bytes": own, "trainer_bytes": 60, "shardable_bytes": divisible, "gathered_bytes": 5}
    return candidate(job_id, created_at, **sizes)


def packed(*jobs: Candidate, capacity: Capacity = ROOM) -> list[str]:
    return [choice.entry.candidate.job_id for choice in choose_pack(order(jobs, 10), capacity)]


def test_jobs_train_together_whose_base_is_held_in_the_same_way() -> None:
    wide, narrow, other = sized("wide", own=50), sized("narrow", 1, own=5), sized("other", 2, own=5)

    assert packed(wide, narrow, other) == ["wide"], "whole it would need 110, divided 95: with 5 left nobody joins"
    assert packed(narrow, other, sized("wide", 3, own=50)) == ["narrow", "other"]
    roomy = replace(ROOM, memory_bytes_free=1000)
    assert packed(wide, narrow, sized("wide too", 3, own=45), capacity=roomy) == ["wide", "wide too"]


def test_a_job_that_needs_whole_weights_is_not_put_on_a_divided_base() -> None:
    dora = sized("dora", own=50, divisible=0)
    assert packed(dora) == []
    assert packed(sized("dora", own=5, divisible=0)) == ["dora"]
    forced = replace(ROOM, group=replace(PAIR, wanted="fsdp2"))
    assert packed(sized("dora", own=5, divisible=0), sized("plain", 1, own=5), capacity=forced) == ["plain"]
    joining = replace(forced, holding="sharded", num_jobs=1)
    entries = order([sized("dora", own=5, divisible=0), sized("plain", 1, own=5)], 10)
    chosen, _ = choose_joiners(entries, joining, "b:bfloat16:causal-lm", worker_bytes=100)
    assert [choice.entry.candidate.job_id for choice in chosen] == ["plain"]


def test_a_live_trainer_takes_only_jobs_that_would_have_its_base_so() -> None:
    wider = sized("wider", own=60)  # divided it would need 105
    entries = order([sized("wide", own=50), sized("narrow", 1, own=5), wider], 10)
    group = replace(PAIR, host_bytes=40)

    def joined(holding: ShardingStrategy) -> list[str]:
        capacity = replace(ROOM, memory_bytes_free=60, num_jobs=1, holding=holding, group=group)
        chosen, _ = choose_joiners(entries, capacity, "b:bfloat16:causal-lm", worker_bytes=100)
        return [choice.entry.candidate.job_id for choice in chosen]

    assert joined("replicated") == ["narrow"]
    assert joined("sharded") == ["wide"]
    assert joined("offloaded") == ["wider"]


def test_for_an_urgent_job_room_is_made_beside_others_only_where_the_base_is_held_as_it_has_it() -> None:
    urgent = replace(sized("urgent", own=50), priority=0, queued_at=0)
    held = {
        "project_id": urgent.project_id,
        "effective_priority": 1,
        "effective_level": 0.0,
        "began_at": 0.0,
        "num_beside": 2,
    }
    training = Training(job_id="victim", own_bytes=60, **held)
    beside = replace(training, job_id="other", own_bytes=10)
    service = WorkerService(at={}, memory_bytes=100, group=PAIR)
    divided = Holder(
        worker_id="w", pack_key=urgent.pack_key, service=service, jobs=(training, beside), holding="sharded"
    )

    def makes(holder: Holder) -> str:
        (entry,) = order([urgent], 10_000)
        chosen = choose_who_leaves(entry, [holder], now=10_000, policy=Policy())
        assert chosen is not None
        return chosen.makes

    assert makes(divided) == "a place"
    assert makes(replace(divided, holding="replicated")) == "a trainer"
