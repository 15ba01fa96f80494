"""Whole ticks on a fake CUDA device: launches, waits of the host, kept bytes and multiplications.

The limits are the counts of today. A change that lowers one lowers its limit here.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from catalog.resources.memory import BaseModelMemory, ElementwiseKernels, kernel_width
from lora_core.base_model.sharding import Strategy, offloads
from tests.lora_core.classifiers import classification_jobs
from tests.lora_core.distributed.test_ranks import BY_ZERO3
from tests.lora_core.fake_cuda import build
from tests.lora_core.scenarios import submissions

ROOT = Path(__file__).parents[3]
Answer = Callable[..., dict[str, Any]]
ON_HOST = {
    ("cpu", "allgather_", "int64"),
    ("cpu", "allgather_", "uint8"),
    ("cpu", "broadcast_", "float64"),
    ("cpu", "broadcast_", "int64"),
    ("cpu", "broadcast_", "uint8"),
}
"""Messages of Ranks. The sharding libraries send none on the host."""
OF_DEEPSPEED = {
    ("cuda", "broadcast_", "uint8"),  # the weights of rank 0, before they are sharded
    ("cuda", "broadcast_", "int64"),  # the order of the blocks, which DeepSpeed compares between ranks
}

SHAPES = {
    "8b": (4096, 14336, 4096, 1024),
    "1b": (2048, 8192, 2048, 512),
    "smollm2": (576, 1536, 576, 192),
}
"""Hidden size, feed-forward size, and features of all queries and of all keys."""
TOKENS, RANK = 16 * 512, 16
KEPT_BYTES = 95_000
"""For one token and layer of 8b."""
FORWARD_LAUNCHES, BACKWARD_LAUNCHES = 23, 37
"""With 16 jobs, for any shape: of a layer as its kernels are chosen on an H100."""
UPDATE_LAUNCHES = 8
"""After the backward pass, for all jobs."""
HEAD_CHUNK_LAUNCHES = 5
"""For 1,024 labels of a job that trains the output head."""


@pytest.fixture(scope="module")
def answer() -> Iterator[Answer]:
    """Ask one process with the device. Equal questions get the same answer."""
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.lora_core.fake_cuda.ticks", str(build.built())]
    known: dict[str, dict[str, Any]] = {}
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        questions, answers = process.stdin, process.stdout
        assert questions is not None
        assert answers is not None

        def ask(run: str, **request: Any) -> dict[str, Any]:
            question = json.dumps({"run": run} | request)
            if question not in known:
                questions.write(question + "\n")
                questions.flush()
                line = answers.readline()
                assert line, "the process has ended; its error is above"
                known[question] = json.loads(line)
            return known[question]

        yield ask
        questions.close()


def per_layer(answer: Answer, shape: str, **options: Any) -> dict[str, Any]:
    """Return the counts that a further layer adds: the difference between ticks of two layers and of one."""
    one, two = (answer("tick", shape=shape, num_layers=number, **options) for number in (1, 2))
    return {
        "forward": two["launches"]["forward"] - one["launches"]["forward"],
        "backward": two["launches"]["backward"] - one["launches"]["backward"],
        "kept_bytes": (two["kept_bytes"] - one["kept_bytes"]) / TOKENS,
        "flops": (two["flops"] - one["flops"]) / TOKENS,
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_launches_of_a_layer_do_not_grow(answer: Answer, shape: str) -> None:
    layer = per_layer(answer, shape)

    assert layer["forward"] <= FORWARD_LAUNCHES
    assert layer["backward"] <= BACKWARD_LAUNCHES


@pytest.mark.parametrize("shape", SHAPES)
def test_the_host_waits_for_the_scores_and_for_the_sizes_of_the_steps_alone(answer: Answer, shape: str) -> None:
    for num_layers in (1, 2):
        tick = answer("tick", shape=shape, num_layers=num_layers)
        assert tick["waits"] == {"update download": 2}
        assert tick["uploads"] == 4, "the pack, its plan, and two tables for the steps of all jobs"


def test_steps_of_more_jobs_take_no_more_uploads_and_launches(answer: Answer) -> None:
    few, many = (answer("tick", shape="smollm2", num_layers=1, num_jobs=number) for number in (2, 16))

    assert few["uploads"] == many["uploads"]
    assert few["launches"]["update"] == many["launches"]["update"] == UPDATE_LAUNCHES


def test_host_does_not_wait_for_the_steps_of_adafactor(answer: Answer) -> None:
    tick = answer("tick", shape="smollm2", num_layers=1, num_jobs=2, optimizer="adafactor")

    assert tick["waits"] == {"update download": 2}


def test_gradient_of_a_trained_head_is_added_without_a_product_in_memory(answer: Answer) -> None:
    """Ticks of 1,024 and 2,048 labels differ by one chunk."""
    one, two = (
        answer("tick", shape="8b", num_layers=1, num_jobs=1, batch_size=size, modules_to_save=["lm_head"])
        for size in (16, 32)
    )

    hidden, vocab = 4096, 128256
    assert two["launches"]["forward"] - one["launches"]["forward"] <= HEAD_CHUNK_LAUNCHES
    assert two["operators"]["forward addmm"] - one["operators"]["forward addmm"] == 1
    assert two["largest_bytes"] == 2 * 1024 * vocab, "the logits of a chunk"
    assert two["largest_bytes"] < 2 * vocab * hidden


def linear_shapes(shape: str) -> dict[str, Any]:
    """Return the linear layers of one block, as lora_core describes a base model."""
    hidden, feed_forward, queries, keys = SHAPES[shape]
    return {
        "q_proj": [[queries, hidden], 1],
        "k_proj": [[keys, hidden], 1],
        "v_proj": [[keys, hidden], 1],
        "o_proj": [[hidden, queries], 1],
        "gate_proj": [[feed_forward, hidden], 1],
        "up_proj": [[feed_forward, hidden], 1],
        "down_proj": [[hidden, feed_forward], 1],
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("elementwise", "kernels"), [("compiled", "cuda"), ("eager", "torch")])
def test_the_memory_estimate_counts_what_a_layer_keeps(
    answer: Answer, shape: str, elementwise: str, kernels: ElementwiseKernels
) -> None:
    chosen = {"elementwise": elementwise}

    counted = BaseModelMemory(
        {"linear_shapes": linear_shapes(shape)}, "bfloat16", kernels=kernels
    ).activation_bytes_per_token()

    kept = per_layer(answer, shape, kernels=chosen)["kept_bytes"]
    assert kept == pytest.approx(counted, rel=0.1)
    tick = answer("tick", shape=shape, num_layers=1, kernels=chosen)
    assert tick["elementwise_kernels"] == kernels
    assert tick["warnings"] == []
    assert (shape, kernels) != ("8b", "cuda") or kept < KEPT_BYTES


@pytest.mark.parametrize("rank", [16, 65, 128])
def test_the_memory_estimate_counts_the_small_products_of_any_rank(answer: Answer, rank: int) -> None:
    """In the smallest model they are a sixth of all at rank 128."""
    shapes = linear_shapes("smollm2")
    base = BaseModelMemory({"linear_shapes": shapes}, "bfloat16", kernels="cuda")
    counted = base.activation_bytes_per_token()
    counted += 2 * len(shapes) * kernel_width(rank)

    assert per_layer(answer, "smollm2", rank=rank)["kept_bytes"] == pytest.approx(counted, rel=0.005)
    tick = answer("tick", shape="smollm2", num_layers=2, rank=rank)
    assert tick["resident_bytes"] - tick["base_bytes"] - tick["adapter_bytes"] < 1024, "no stack of matrices is kept"


@pytest.mark.parametrize(("family", "num_norms", "allowed"), [("gemma", 3, 0.1), ("gemma2", 5, 0.2)])
def test_memory_is_that_of_single_operations_if_no_kernel_has_the_numbers_of_norms_and_activations(
    answer: Answer, family: str, num_norms: int, allowed: float
) -> None:
    """Gemma norms multiply by 1 + w, and its gates are GELU. Gemma 2 has norms behind attention and MLP too, which the
    estimate does not count."""
    counted = BaseModelMemory(
        {"linear_shapes": linear_shapes("8b")}, "bfloat16", kernels="torch"
    ).activation_bytes_per_token()

    kept = per_layer(answer, "8b", family=family)["kept_bytes"]

    tick = answer("tick", shape="8b", num_layers=1, family=family)
    assert kept == pytest.approx(counted, rel=allowed)
    assert tick["elementwise_kernels"] == "torch"
    (warning,) = tick["warnings"]
    names, _, reason = warning.partition(" run operation by operation: ")
    prefix = family.capitalize()
    assert sorted(names.split(", ")) == [f"1 {prefix}DecoderLayer", f"1 {prefix}MLP", f"{num_norms} {prefix}RMSNorm"]
    assert reason == "no kernel gives the same numbers"


@pytest.mark.slow
@pytest.mark.parametrize(("elementwise", "kernels"), [("compiled", "cuda"), ("eager", "torch")])
def test_the_memory_estimate_counts_what_a_layer_of_float32_keeps(
    answer: Answer, elementwise: str, kernels: ElementwiseKernels
) -> None:
    counted = BaseModelMemory(
        {"linear_shapes": linear_shapes("smollm2")}, "float32", kernels=kernels
    ).activation_bytes_per_token()

    kept = per_layer(answer, "smollm2", kernels={"elementwise": elementwise}, dtype="float32")["kept_bytes"]
    assert kept == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_costs_its_products_with_the_frozen_weights_twice_and_lora(answer: Answer, shape: str) -> None:
    """No gradient of a frozen weight is computed: 2 operations a weight forward, 2 backward, and 6 for A and for B."""
    hidden, feed_forward, queries, keys = SHAPES[shape]
    linears = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    linears += [(feed_forward, hidden), (feed_forward, hidden), (hidden, feed_forward)]

    expected = sum(4 * rows * columns + 6 * RANK * (rows + columns) for rows, columns in linears)

    assert per_layer(answer, shape)["flops"] == expected


@pytest.mark.parametrize("options", [{"family": "gemma2"}, {"dtype": "float32"}], ids=["capped scores", "float32"])
def test_attention_without_flash_attention_takes_three_launches_for_all_sequences(
    answer: Answer, options: dict[str, Any]
) -> None:
    tick = answer("tick", shape="smollm2", num_layers=2, **options)

    found = {name: count for name, count in tick["operators"].items() if "attention" in name}
    assert found == {"forward attention": 2, "backward attention, queries": 2, "backward attention, keys": 2}
    assert tick["waits"] == {"update download": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "launches"),
    [
        ({"kernels": {"elementwise": "eager"}}, (47, 88)),
        ({"kernels": {"lora": "loop"}}, (255, 693)),
        ({"rank": 5}, (23, 37)),
        ({"dropout": 0.05}, (23, 37)),
    ],
    ids=["eager norms and activations", "LoRA by segment", "padded rank", "dropout"],
)
def test_launches_of_other_kernels_do_not_grow(
    answer: Answer, options: dict[str, Any], launches: tuple[int, int]
) -> None:
    layer = per_layer(answer, "smollm2", **options)

    assert layer["forward"] <= launches[0]
    assert layer["backward"] <= launches[1]


@pytest.mark.slow
def test_recomputed_blocks_keep_their_inputs_and_the_small_products_alone(answer: Answer) -> None:
    hidden, *_ = SHAPES["smollm2"]
    of_adapters = 7 * RANK  # x Aᵀ of each linear layer

    kept = per_layer(answer, "smollm2", checkpointed=True)["kept_bytes"]
    assert kept == pytest.approx(2 * (hidden + of_adapters), rel=0.01)  # and the tables of the adapters


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elementwise", ["compiled", "eager"])
def test_a_tick_keeps_less_than_the_engine_assumes_before_a_tick_has_measured_it(
    answer: Answer, shape: str, elementwise: str
) -> None:
    """layers/activation_checkpointing.py then decides between keeping and recomputing with MARGIN."""
    chosen = {"elementwise": elementwise}
    one, two = (
        answer("tick", shape=shape, num_layers=layers, kernels=chosen)["assumed_bytes_per_token"] for layers in (1, 2)
    )

    kept = per_layer(answer, shape, kernels=chosen)["kept_bytes"]

    assert kept < two - one < 1.4 * kept


def test_dropout_masks_of_the_loop_are_drawn_by_the_device(answer: Answer) -> None:
    dora = {"shape": "smollm2", "num_layers": 2, "num_jobs": 2, "use_dora": True}

    plain, dropped = answer("tick", **dora), answer("tick", **dora, dropout=0.1)

    assert dropped["operators"]["forward dropout mask"] == 2 * 2 * 7, "a mask of each job and linear layer"
    assert dropped["uploads"] == plain["uploads"]
    assert dropped["waits"] == plain["waits"]


def test_initial_weights_are_drawn_by_the_device_at_once(answer: Answer) -> None:
    """The host sends a bound for each row of A, and draws no number of the large ones."""
    for num_layers in (1, 2):
        found = answer("initialization", shape="8b", num_layers=num_layers, rank=128)

        num_linears = 7 * num_layers
        assert found["operators"]["forward uniform numbers"] == num_linears
        assert found["uploads"] == num_linears
        assert found["waits"] == {}
        assert found["drawn_on_host"] <= 32, "the order of the rows"
        assert found["is_started"]


def test_the_host_waits_for_the_tokens_of_a_pass_alone(answer: Answer) -> None:
    """The host uploads the rows of the newest tokens and the addresses of caches once, not in each layer."""
    one, two = (answer("answers", num_layers=layers, num_prompts=prompts) for layers, prompts in ((1, 1), (2, 4)))

    assert one["waits"] == two["waits"] == {"forward download": 2}
    assert one["uploads"] == two["uploads"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_launches_of_a_layer_do_not_grow_with_the_number_of_answers(answer: Answer, dtype: str) -> None:
    few, many = (
        [answer("answers", num_layers=layers, num_prompts=prompts, dtype=dtype) for layers in (1, 2)]
        for prompts in (1, 7)
    )

    of_layer = [two["launches"]["forward"] - one["launches"]["forward"] for one, two in (few, many)]
    assert of_layer[0] == of_layer[1]
    for one, two in (few, many):
        assert [found["operators"]["forward attention of newest tokens"] for found in (one, two)] == [1, 2]


def test_gradient_of_tied_trained_tokens_is_computed_without_a_copy_of_the_chunk(answer: Answer) -> None:
    plain, trained = (
        answer("tick", shape="smollm2", num_layers=1, num_jobs=1, trained_tokens=number) for number in (0, 3)
    )

    assert plain["largest_bytes"] == trained["largest_bytes"]
    assert trained["operators"].get("forward index_fill_") == 1
    assert "forward index_fill" not in trained["operators"]


def test_the_host_does_not_wait_for_the_copies_of_a_checkpoint(answer: Answer) -> None:
    """The thread that writes the files waits for the device."""
    for found in answer("snapshots", family="llama").values():
        assert found["waits"] == {}
        assert found["downloads"] >= 4, "p, m, v, and the weights of the adapter"
        assert found["waits_of_writer"] == {"forward event": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "dtype", "most_waits"),
    [
        ("llama", "causal-lm", "bfloat16", 3),
        ("gpt2", "causal-lm", "bfloat16", 3),
        ("llama", "sequence-classification", "bfloat16", 2),
        ("bert", "sequence-classification", "float32", 2),
        ("roberta", "sequence-classification", "bfloat16", 2),
        ("modernbert", "sequence-classification", "bfloat16", 2),
    ],
)
def test_no_kind_of_job_mixes_devices_or_waits_more_often(
    answer: Answer, family: str, task: str, dtype: str, most_waits: int
) -> None:
    """A preference loss is computed on the host between two passes, which is one wait more, and its reference is one
    pass more."""
    found = answer("jobs", family=family, task=task, dtype=dtype)

    expected = submissions(family) if task == "causal-lm" else classification_jobs()
    assert found["steps"].keys() == expected.keys()
    assert all(found["steps"].values())
    assert sum(found["most_waits"].values()) <= most_waits, found["most_waits"]
    if task != "causal-lm":
        assert {wait.partition(" ")[0] for wait in found["most_waits"]} == {"update"}, "a wait before the backward pass"


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_offload", *BY_ZERO3])
def test_sharded_trainers_send_what_nccl_can_send(answer: Answer, strategy: Strategy) -> None:
    """Tensors of the device go through NCCL, which needs them to be contiguous. All other messages are on the host, and
    go through gloo. Each process group has both backends, also the one that DeepSpeed creates and sends nothing with.

    This process is rank 0 alone, so the test can't show that all ranks send the same messages in the same order. Two
    processes with gloo show that (distributed/test_ranks.py).
    """
    is_zero3 = strategy.startswith("zero3")

    found = answer("sharded jobs", strategy=strategy)

    assert all(found["steps"].values())
    assert found["shards"] == (["cpu"] if offloads(strategy) else ["cuda"])
    assert found["groups"] == ["cpu:fake,cuda:fake"] * (2 if is_zero3 else 1)
    assert found["num_senders"] == 1
    assert all(is_contiguous for *_, is_contiguous in found["messages"])
    by_device = {(device, name, dtype) for name, device, dtype, _ in found["messages"]}
    assert {message for message in by_device if message[0] != "cpu"} == {
        ("cuda", "_allgather_base_", "bfloat16"),  # the weights of a block
        ("cuda", "broadcast_", "float32"),  # gradients
        ("cuda", "send", "float32"),
        *(OF_DEEPSPEED if is_zero3 else ()),
    }
    assert {message for message in by_device if message[0] == "cpu"} == ON_HOST
