"""`make bench-gpu` runs end to end at toy size on a CPU. The measured values are meaningless."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import datasheet_flops, main
from benchmarks.gpu.comparisons import left_out
from benchmarks.gpu.contenders import Clock, Lorry, Peft, adapted
from benchmarks.gpu.load import Load
from benchmarks.gpu.shapes import TOY, build
from benchmarks.results import Result
from lora_core.kernels.selection import Kernels
from lora_core.layers.activation_checkpointing import ActivationMemory

# PEFT reads an attribute of transformers under a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LOAD = Load(num_jobs=1, batch_size=2, shortest=8, longest=24, rank=4)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_every_comparison_is_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--out", str(tmp_path)])

    found = {
        content["theme"]: content for content in map(json.loads, (path.read_text() for path in tmp_path.iterdir()))
    }
    assert found.keys() == {"gpu_steady_state_toy", "gpu_kernels_toy", "gpu_tick_sizes_toy"}
    table = capsys.readouterr().out
    for text in ("lorry over peft, 3 jobs", "MFU by the datasheet, 3 jobs", "recomputed blocks"):
        assert text in table
    steady = found["gpu_steady_state_toy"]["repeats"]
    assert steady.keys() == {"lorry_1 job", "lorry_3 jobs", "peft", "matrix"}
    assert steady["lorry_3 jobs"][0]["ticks"] == 1
    goals = {finding["what"]: finding["goal"] for finding in found["gpu_steady_state_toy"]["findings"]}
    assert goals["lorry over peft, 3 jobs"] == 3.0
    assert goals["share of the matrix rate (4P a token), 3 jobs"] == 0.5
    ticks = found["gpu_tick_sizes_toy"]["repeats"]
    assert {name: reports[0]["tokens"] for name, reports in ticks.items()} == {"32 tokens": 32, "64 tokens": 64}


def test_contenders_train_on_the_same_tokens_and_leave_the_base_unchanged() -> None:
    base = build(TOY, device="cpu")
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}

    with adapted(base, rank=4) as model:
        assert any("lora_A" in name for name, _ in model.named_parameters())
    lorry, peft = Lorry(base, LOAD, Kernels()), Peft(base, LOAD)
    lorry.turn()
    ours, theirs = lorry.turn(), peft.turn()  # the second step of each, because PEFT's first is not counted

    assert (ours["tokens"], ours["ticks"]) == (theirs["tokens"], 1)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    after = dict(base.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())


def test_peak_memory_covers_all_ticks_since_the_start_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"allocated": 10, "peak": 10}
    for name, replacement in {
        "synchronize": lambda device: None,
        "memory_allocated": lambda device: card["allocated"],
        "max_memory_allocated": lambda device: card["peak"],
        "reset_peak_memory_stats": lambda device: card.update(peak=card["allocated"]),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    memory = ActivationMemory({}, device="cuda:0", item_bytes=2, mode="auto")
    clock = Clock("cuda:0", memory)

    def measure(*taken: int) -> int:
        clock.start()
        for bytes_taken in taken:
            with memory.observed(1024, kind="train", checkpointed=False):  # which resets the card's peak
                card["peak"] = card["allocated"] + bytes_taken
        return clock.stop()["peak_bytes"]

    assert [measure(900, 50), measure(40, 300, 20), measure(5)] == [910, 310, 15]
    assert memory.peak_bytes() == 15


def test_lorry_clock_restarts_the_peak_through_the_engine() -> None:
    lorry = Lorry(build(TOY, device="cpu"), LOAD, Kernels())
    calls: list[str] = []
    lorry.engine.activations.restart_peak = lambda: calls.append("restart_peak")  # pyright: ignore[reportAttributeAccessIssue]

    lorry.turn()

    assert calls == ["restart_peak"]


def test_missing_gpu_is_rejected_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(SystemExit) as refused:
        main([])

    assert refused.value.code == 2
    text = capsys.readouterr().err
    assert "torch finds none here" in text
    assert "--quick" in text


def test_out_of_memory_contender_is_left_out_with_the_reason() -> None:
    result = Result(theme="any", settings={}, repeats={"large": [{"seconds": 1.0}]})

    with left_out(result, "large"):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")

    assert result.left_out == {"large": "CUDA out of memory."}
    assert result.repeats == {}


def test_datasheet_flops_are_found_by_card_name_and_none_if_unknown() -> None:
    assert datasheet_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert datasheet_flops("NVIDIA H100 PCIe") == 756e12
    assert datasheet_flops("NVIDIA Unheard Of") is None
