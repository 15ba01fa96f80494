"""Memory per device in a device group, and the jobs that train on a sharded base model, computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from catalog.resources import sharding
from catalog.resources.memory import BaseModelMemory
from catalog.resources.sharding import CARDS, MIB, NEVER, Demand, DeviceGroup, ShardingStrategy, Wanted
from catalog.scheduling.ordering import order
from catalog.scheduling.packing import choose_joiners, choose_pack
from catalog.scheduling.preemption import Holder, Training
from catalog.scheduling.preemption import choose as choose_who_leaves
from catalog.scheduling.snapshot import Candidate, Capacity, Policy, WorkerService
from tests.catalog.scheduling.test_fairness_over_days import candidate

GB = 10**9
CUDA_CONTEXT = 600 * MIB
RESERVE = CUDA_CONTEXT + 1024 * MIB  # with the NCCL buffers: 1,702,887,424 bytes


def llama(*, hidden: int, keys: int, inner: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """Describe a model as lora_core does, with a head that is not tied to the embeddings."""
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


# 7B (Llama 2): a block has 4 · 4096² + 3 · 4096 · 11008 + 2 · 4096 = 202,383,360 parameters, and 32 blocks have
# 6,476,267,520. With embeddings and head of 32000 · 4096 each and a norm of 4096, the total is 6,738,415,616.
SEVEN = llama(hidden=4096, keys=4096, inner=11008, layers=32, vocabulary=32000)
# 70B (Llama 3): a block has 2 · 8192² + 2 · 8192 · 1024 + 3 · 8192 · 28672 + 2 · 8192 = 855,654,400 parameters, and 80
# blocks have 68,452,352,000. With embeddings and head of 128256 · 8192 each and a norm of 8192, the total is
# 70,553,706,496.
SEVENTY = llama(hidden=8192, keys=1024, inner=28672, layers=80, vocabulary=128256)


def demand(description: dict[str, Any], precision: str = "bfloat16", *, own: int = GB) -> Demand:
    """Return the demand of a job that needs `own` bytes in addition to its trainer."""
    divisible, gathered = sharding.block_bytes(description, precision)
    whole = BaseModelMemory(description, precision).trainer_bytes() + own
    return Demand(whole_bytes=whole, shardable_bytes=divisible, gathered_bytes=gathered)


def gpus(number: int, gigabytes: int, wanted: Wanted = "auto", *, host: int = 0) -> DeviceGroup:
    """Return a group of GPUs of this size. `host` is the host memory in bytes that a base model may use."""
    card = next(card for card in CARDS if card.gigabytes == gigabytes)
    return DeviceGroup(kind="cuda", num_devices=number, bytes_of_each=card.memory_bytes, wanted=wanted, host_bytes=host)


def test_reference_models_have_the_expected_sizes() -> None:
    assert (SEVEN["num_parameters"], SEVEN["blocks"]["largest_parameters"]) == (6_738_415_616, 202_383_360)
    assert (SEVENTY["num_parameters"], SEVENTY["blocks"]["largest_parameters"]) == (70_553_706_496, 855_654_400)
    # A tick of 1,024 tokens keeps the outputs of all layers, and each input once: for 70B 1024 · 80 ·
    # (6 · 8192 + 2 · 1024 + 3 · 28672) values of 2 bytes. Its logits are 2 · 256 · 128256 values of 4 bytes. The
    # weights add 141,107,412,992 bytes.
    assert BaseModelMemory(SEVENTY, "bfloat16").trainer_bytes() == 141_107_412_992 + 22_481_469_440 + 262_668_288
    # For 7B: 1024 · 32 · (8 · 4096 + 3 · 11008) values, and logits of 2 · 256 · 32000.
    assert BaseModelMemory(SEVEN, "bfloat16").trainer_bytes() == 13_476_831_232 + 4_311_744_512 + 65_536_000
    # Three full blocks exist at one time: the one that computes, and the next one twice.
    assert sharding.block_bytes(SEVENTY, "bfloat16") == (136_904_704_000, 3 * 1_711_308_800)


SEVENTY_ON_EIGHT = 163_851_550_720 + 5 * GB - 136_904_704_000 + 17_113_088_000 + 5_133_926_400 + RESERVE
# With shards in host memory: three full blocks, and half of the incoming block.
SEVENTY_FROM_HOST = 163_851_550_720 + 5 * GB - 136_904_704_000 + 5_133_926_400 + 855_654_400 + RESERVE
SEVEN_IN_FP32_ON_FOUR = 35_642_687_488 + GB - 25_905_070_080 + 6_476_267_520 + 2_428_600_320 + RESERVE


@pytest.mark.parametrize(
    ("group", "needs", "strategy", "needed", "fits"),
    [
        # One GPU cannot shard: with the CUDA context, the job needs 169.5 GB of 85.0 GB.
        (gpus(1, 80), demand(SEVENTY, own=5 * GB), "replicated", 168_851_550_720 + CUDA_CONTEXT, False),
        # One eighth of the blocks, three full blocks, and everything outside the blocks: 55.9 GB of 85.0 GB.
        (gpus(8, 80), demand(SEVENTY, own=5 * GB), "fsdp2", SEVENTY_ON_EIGHT, True),
        # Half of the blocks is 68.5 GB: 107.2 GB of 85.0 GB.
        (gpus(2, 80), demand(SEVENTY, own=5 * GB), "fsdp2", SEVENTY_ON_EIGHT + 51_339_264_000, False),
        # A full replica of 7B with everything else: 20.6 GB of 23.8 GB.
        (gpus(2, 24), demand(SEVEN), "replicated", 18_854_111_744 + RESERVE, True),
        # In fp32 a replica needs 36.6 GB. With a quarter of its blocks it needs 21.3 GB.
        (gpus(4, 24), demand(SEVEN, "float32"), "fsdp2", SEVEN_IN_FP32_ON_FOUR, True),
        (gpus(2, 24), demand(SEVEN, "float32"), "fsdp2", SEVEN_IN_FP32_ON_FOUR + 6_476_267_520, False),
        # The operator's strategy shards a base model that fits, and replicates one that does not.
        (gpus(2, 24, "zero3"), demand(SEVEN), "zero3", 18_854_111_744 - 6_476_267_520 + 1_214_300_160 + RESERVE, True),
        (gpus(8, 80, "replicated"), demand(SEVENTY, own=5 * GB), "replicated", 168_851_550_720 + RESERVE, False),
        # A job that needs full weights trains on replicas, and nowhere if the operator shards every base model.
        (gpus(8, 80), replace(demand(SEVENTY), shardable_bytes=0), "replicated", 164_851_550_720 + RESERVE, False),
        (gpus(2, 24, "fsdp2"), replace(demand(SEVEN), shardable_bytes=0), "fsdp2", NEVER, False),
        # Where half of the blocks is too much, host memory holds them: 39.6 GB of 47.9 GB, and 136.9 GB on the host.
        (gpus(2, 48, host=136_904_704_000), demand(SEVENTY, own=5 * GB), "fsdp2_offload", SEVENTY_FROM_HOST, True),
        # The host lacks one byte, so the base model stays sharded, which does not fit: 107.2 GB of 47.9 GB.
        (
            gpus(2, 48, host=136_904_703_999),
            demand(SEVENTY, own=5 * GB),
            "fsdp2",
            SEVENTY_ON_EIGHT + 51_339_264_000,
            False,
        ),
        # A base model that fits sharded is not offloaded, however large the host is. A single GPU never offloads.
        (gpus(8, 80, host=10**12), demand(SEVENTY, own=5 * GB), "fsdp2", SEVENTY_ON_EIGHT, True),
        (gpus(1, 80, host=10**12), demand(SEVENTY, own=5 * GB), "replicated", 168_851_550_720 + CUDA_CONTEXT, False),
        # If the operator requires it, everything is offloaded, and a job that exceeds the host memory trains nowhere.
        (
            gpus(2, 24, "zero3_offload", host=20 * GB),
            demand(SEVEN),
            "zero3_offload",
            18_854_111_744 - 12_952_535_040 + 1_214_300_160 + 202_383_360 + RESERVE,
            True,
        ),
        (gpus(2, 24, "fsdp2_offload", host=12 * GB), demand(SEVEN), "fsdp2_offload", NEVER, False),
        # On a CPU the processes share the memory, and nothing is reserved.
        (DeviceGroup(num_devices=2, bytes_of_each=20 * GB), demand(SEVEN), "replicated", 18_854_111_744, True),
        # There host memory is the same memory: nothing is offloaded automatically, and a required offload saves
        # nothing.
        (DeviceGroup(num_devices=2, bytes_of_each=12 * GB), demand(SEVEN), "fsdp2", 13_592_144_384, False),
        (
            DeviceGroup(num_devices=2, bytes_of_each=15 * GB, wanted="fsdp2_offload"),
            demand(SEVEN),
            "fsdp2_offload",
            13_592_144_384 + 202_383_360,
            True,
        ),
    ],
)
def test_strategy_and_bytes_per_device(
    group: DeviceGroup, needs: Demand, strategy: str, needed: int, fits: bool
) -> None:
    assert (group.strategy(needs), group.needed_bytes(needs)) == (strategy, needed)
    assert (group.needed_bytes(needs) <= group.bytes_of_each) == fits


def test_base_is_sharded_as_soon_as_one_byte_does_not_fit() -> None:
    fits = demand(SEVEN)
    just = DeviceGroup(num_devices=2, bytes_of_each=fits.whole_bytes)

    assert just.strategy(fits) == "replicated"
    assert replace(just, bytes_of_each=fits.whole_bytes - 1).strategy(fits) == "fsdp2"


def test_parts_on_a_device_sum_to_its_required_bytes() -> None:
    needs, group = demand(SEVENTY), gpus(8, 80)
    rest = needs.whole_bytes - needs.shardable_bytes

    sharded, offloaded = group.block_parts(needs, "sharded"), group.block_parts(needs, "offloaded")

    assert sharded == {"base_share": 17_113_088_000, "gathered_blocks": 5_133_926_400}
    # One eighth of a block of 1,711,308,800 bytes is incoming.
    assert offloaded == {"base_share": 0, "gathered_blocks": 5_133_926_400, "coming_share": 213_913_600}
    assert rest + sum(sharded.values()) == group.allocated_bytes(needs, "sharded")
    assert rest + sum(offloaded.values()) == group.allocated_bytes(needs, "offloaded")


def test_host_memory_for_a_base_excludes_the_trainers() -> None:
    # 0.9 · 10^12, minus 2^32 for each of eight processes.
    assert sharding.host_bytes(10**12, num_processes=8) == 865_640_261_632
    assert sharding.host_bytes(10**9, num_processes=8) == 0


def test_base_is_offloaded_as_soon_as_one_byte_does_not_fit_sharded() -> None:
    needs = demand(SEVEN)
    just = DeviceGroup(num_devices=2, bytes_of_each=13_592_144_384, host_bytes=10**12)
    assert just.strategy(needs) == "fsdp2"
    assert replace(just, bytes_of_each=13_592_144_383).strategy(needs) == "fsdp2_offload"


def test_suggested_devices_have_number_and_size() -> None:
    found = sharding.would_fit(demand(SEVENTY, own=5 * GB))
    *reported, from_host = [(fit.num_devices, fit.card.gigabytes, fit.host_bytes) for fit in found]
    assert reported == [(1, 180, 0), (2, 141, 0), (4, 80, 0)], "eight GPUs of 48 GB would need 55.9 GB of 47.8 GB each"
    assert from_host == (2, 40, 136_904_704_000)
    sentence = (
        "It would fit on one GPU with 180 GB, or on 2 GPUs with 141 GB each, or on 4 GPUs with 80 GB each, or on 2 "
        "GPUs with 40 GB each and 136.9 GB of host memory for the base model."
    )
    assert sharding.would_fit_sentence(sharding.would_fit(demand(SEVENTY, own=5 * GB))) == sentence
    whole = replace(demand(SEVENTY, own=5 * GB), shardable_bytes=0)
    assert [(fit.num_devices, fit.card.gigabytes) for fit in sharding.would_fit(whole)] == [(1, 180)]
    assert "no common GPU" in sharding.would_fit_sentence(sharding.would_fit(Demand(whole_bytes=10**13)))


def test_explanation_of_a_job_that_fits_nowhere() -> None:
    large = demand(SEVENTY, own=5 * GB)
    whole, bar = replace(large, shardable_bytes=0), "DoRA needs the full weights"

    assert sharding.explain_misfit([(gpus(1, 80), large), (gpus(8, 80), large)], None) is None
    reported = sharding.explain_misfit([(gpus(1, 80), large)], None)
    assert reported == "The job needs about 169.5 GB, but the largest worker has 85.0 GB."
    assert "Sharding across the 2 devices" in str(sharding.explain_misfit([(gpus(2, 80), large)], None))
    assert str(sharding.explain_misfit([(gpus(8, 80), whole)], bar)).endswith(f"has 85.0 GB. {bar}.")
    assert bar not in str(sharding.explain_misfit([(gpus(1, 80), whole)], bar)), "one GPU does not shard"
    forced = str(sharding.explain_misfit([(gpus(2, 24, "fsdp2"), replace(demand(SEVEN), shardable_bytes=0))], bar))
    assert forced == (
        f"The largest worker always shards base models across its devices (LORRY_STRATEGY is fsdp2). {bar}."
    )


def test_explanation_of_a_job_that_exceeds_the_host_memory() -> None:
    large = demand(SEVENTY, own=5 * GB)

    reported = sharding.explain_misfit([(gpus(2, 48, host=100 * GB), large)], None)
    assert reported == (
        "Sharding across the 2 devices of the largest worker needs about 107.2 GB per device, but the smallest device "
        "has 47.9 GB. With shards in host memory it would need about 39.6 GB per device and about 136.9 GB of host "
        "memory, of which a base model may use 100.0 GB."
    )
    small = str(sharding.explain_misfit([(gpus(2, 24, host=10 * GB), large)], None))
    assert small.endswith("the smallest device has 23.8 GB."), "host memory would not help either"
    forced = sharding.explain_misfit([(gpus(2, 48, "fsdp2_offload", host=100 * GB), large)], None)
    assert forced == (
        "Sharding across the 2 devices of the largest worker would need about 136.9 GB of host memory, of which a base "
        "model may use 100.0 GB."
    )
    narrow = sharding.explain_misfit([(gpus(2, 24, host=200 * GB), large)], None)
    assert narrow == (
        "Sharding across the 2 devices of the largest worker, with shards in host memory, needs about 39.6 GB per "
        "device, but the smallest device has 23.8 GB."
    )


@pytest.mark.parametrize(
    ("lora", "quantization", "description", "reported"),
    [
        ({}, "none", SEVEN, None),
        ({"init_lora_weights": "gaussian"}, "none", SEVEN, None),
        ({"use_dora": True}, "none", SEVEN, "DoRA needs"),
        ({"init_lora_weights": "pissa_niter_4"}, "none", SEVEN, "pissa_niter_4 decomposes"),
        ({}, "nf4", SEVEN, "quantized to nf4"),
        ({}, "none", {"blocks": {"count": 0}}, "no list of blocks"),
    ],
)
def test_reasons_against_sharding_a_job(
    lora: dict[str, Any], quantization: str, description: dict[str, Any], reported: str | None
) -> None:
    found = sharding.hindrance(lora, quantization, description)
    assert found is None if reported is None else reported in str(found)


def test_placement_reason_contains_the_numbers() -> None:
    small, large = demand(SEVEN), demand(SEVENTY, own=5 * GB)
    assert sharding.reason(gpus(1, 24), small) == "The worker has one device, which holds the full base model."
    assert sharding.reason(gpus(2, 24), small) == (
        "Each device holds a full replica of the base model: the job needs about 20.6 GB per device, and the smallest "
        "of 2 devices has 23.8 GB."
    )
    assert sharding.reason(gpus(8, 80), large) == (
        "A full replica of the base model would need about 170.6 GB per device, and the smallest of 8 devices has "
        "85.0 GB. Sharding across 8 devices needs about 55.9 GB per device."
    )
    assert sharding.reason(gpus(2, 48, host=200 * GB), large) == (
        "Sharding the base model across the devices would need about 107.2 GB per device, and the smallest of 2 "
        "devices has 47.9 GB. Sharding across 2 devices with shards in host memory (about 136.9 GB in total) needs "
        "about 39.6 GB per device."
    )
    reported = sharding.reason(gpus(2, 24, "zero3_offload", host=200 * GB), small)
    assert reported.startswith(
        "LORRY_STRATEGY is zero3_offload. Sharding across 2 devices with shards in host memory (about"
    )
    assert "LORRY_STRATEGY is fsdp2. Sharding across 2" in sharding.reason(gpus(2, 24, "fsdp2"), small)
    assert "LORRY_STRATEGY is replicated" in sharding.reason(gpus(2, 24, "replicated"), small)


@pytest.mark.parametrize("wanted", ["auto", "fsdp2"])
def test_gang_never_shards_a_base(wanted: Wanted) -> None:
    large, alone = Demand(whole_bytes=150 * 10**9, shardable_bytes=140 * 10**9), gpus(4, 80, wanted)
    of_gang = replace(alone, gang="hall")

    assert (alone.strategy(large), of_gang.strategy(large)) == ("fsdp2", "replicated")
    assert of_gang.needed_bytes(large) == large.whole_bytes + alone.reserve_bytes
    assert "gang hall holds a full replica of the base model" in sharding.reason(of_gang, large)
    assert replace(gpus(1, 80), gang="hall").reserve_bytes == alone.reserve_bytes, "a gang needs NCCL buffers too"


def test_group_is_read_from_the_worker_report_and_defaults_to_replicated() -> None:
    device = {"kind": "cuda", "indices": [0, 1], "num_processes": 2, "strategy": "auto", "host_bytes": 7}
    assert sharding.reported_group([device], 5) == DeviceGroup(
        kind="cuda", num_devices=2, bytes_of_each=5, host_bytes=7
    )
    old = {"kind": "cuda", "indices": [0, 1]}
    assert sharding.reported_group([old], 5).shards_when == "never"
    assert sharding.reported_group([], 5) == DeviceGroup(bytes_of_each=5, wanted="replicated")


# Two devices of 100 bytes. A base model of 60, of which 40 are blocks, and 5 gathered: sharded it takes 20 + 20 + 5.
PAIR = DeviceGroup(num_devices=2, bytes_of_each=100)
ROOM = Capacity(max_jobs=4, memory_bytes_free=100, group=PAIR)


def sized(job_id: str, created_at: float = 0, *, own: int, divisible: int = 40) -> Candidate:
    sizes: dict[str, Any] = {"own_bytes": own, "trainer_bytes": 60, "shardable_bytes": divisible, "gathered_bytes": 5}
    return candidate(job_id, created_at, **sizes)


def packed(*jobs: Candidate, capacity: Capacity = ROOM) -> list[str]:
    return [choice.entry.candidate.job_id for choice in choose_pack(order(jobs, 10), capacity)]


def test_jobs_train_together_only_with_the_same_placement() -> None:
    wide, narrow, other = sized("wide", own=50), sized("narrow", 1, own=5), sized("other", 2, own=5)

    assert packed(wide, narrow, other) == ["wide"], "a replica would need 110, sharding 95: no job fits into 5"
    assert packed(narrow, other, sized("wide", 3, own=50)) == ["narrow", "other"]
    roomy = replace(ROOM, memory_bytes_free=1000)
    assert packed(wide, narrow, sized("wide too", 3, own=45), capacity=roomy) == ["wide", "wide too"]


def test_job_that_needs_full_weights_is_not_put_on_a_sharded_base() -> None:
    dora = sized("dora", own=50, divisible=0)
    assert packed(dora) == []
    assert packed(sized("dora", own=5, divisible=0)) == ["dora"]
    forced = replace(ROOM, group=replace(PAIR, wanted="fsdp2"))
    assert packed(sized("dora", own=5, divisible=0), sized("plain", 1, own=5), capacity=forced) == ["plain"]
    joining = replace(forced, holding="sharded", num_jobs=1)
    entries = order([sized("dora", own=5, divisible=0), sized("plain", 1, own=5)], 10)
    chosen, _ = choose_joiners(entries, joining, "b:bfloat16:causal-lm", worker_bytes=100)
    assert [choice.entry.candidate.job_id for choice in chosen] == ["plain"]


def test_live_trainer_accepts_only_jobs_with_its_placement() -> None:
    wider = sized("wider", own=60)  # sharded it would need 105
    entries = order([sized("wide", own=50), sized("narrow", 1, own=5), wider], 10)
    group = replace(PAIR, host_bytes=40)

    def joined(holding: ShardingStrategy) -> list[str]:
        capacity = replace(ROOM, memory_bytes_free=60, num_jobs=1, holding=holding, group=group)
        chosen, _ = choose_joiners(entries, capacity, "b:bfloat16:causal-lm", worker_bytes=100)
        return [choice.entry.candidate.job_id for choice in chosen]

    assert joined("replicated") == ["narrow"]
    assert joined("sharded") == ["wide"]
    assert joined("offloaded") == ["wider"]


def test_preemption_frees_a_place_only_with_the_same_placement() -> None:
    urgent = replace(sized("urgent", own=50), priority=0, queued_at=0)
    held = {
        "claim_id": "c",
        "project_id": urgent.project_id,
        "effective_priority": 1,
        "effective_level": 0.0,
        "began_at": 0.0,
        "num_packmates": 2,
    }
    training = Training(job_id="victim", own_bytes=60, **held)
    packmate = replace(training, job_id="other", own_bytes=10)
    service = WorkerService(at={}, memory_bytes=100, group=PAIR)
    sharded = Holder(
        worker_id="w", pack_key=urgent.pack_key, service=service, jobs=(training, packmate), holding="sharded"
    )

    def makes(holder: Holder) -> str:
        (entry,) = order([urgent], 10_000)
        chosen = choose_who_leaves(entry, [holder], now=10_000, policy=Policy())
        assert chosen is not None
        return chosen.makes

    assert makes(sharded) == "a place"
    assert makes(replace(sharded, holding="replicated")) == "a trainer"
