"""The GPU kit runs every stage on a CPU without the packages that a bare machine lacks, and survives what fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import pytest
import torch

from benchmarks.gpu.kit import __main__ as command
from benchmarks.gpu.kit import comparisons, kernels, run
from benchmarks.gpu.kit.comparisons import Turn, adapted, lorry, peft_loop
from benchmarks.gpu.kit.facts import datasheet_flops
from benchmarks.gpu.kit.kernels import check_attention
from benchmarks.gpu.kit.kit import Kit, StageOver
from benchmarks.gpu.kit.load import Load
from benchmarks.gpu.kit.log import Log
from benchmarks.gpu.kit.profiles import kept_bytes_per_token
from benchmarks.gpu.kit.shapes import TOY, build
from benchmarks.gpu.kit.sizes import JOB_TOKENS, SLICE_TOKENS, TICK_TOKENS, Budgets, full, quick
from benchmarks.gpu.kit.supervision import PROGRESS, Progress
from benchmarks.workload import ROOT
from catalog.resources import memory
from lora_core.base_model.patching import find_linears
from lora_core.kernels.selection import Kernels
from lora_core.layers.attention import flash
from tests.benchmarks.kit_log import lines_of
from tests.lora_core.kernels.gpu.triton_folder import environment
from tests.lora_core.varlen_stand_in import StandIn
from tests.services.programs import Missing
from worker.process import launcher


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(log=Log(tmp_path, started=time.monotonic()), sizes=quick())


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    program = [sys.executable, "-m", "tests.benchmarks.hidden_packages", "benchmarks.gpu.kit"]
    options = ["--quick", "--out", str(folder), "--seconds", "3000"]  # it ends with its stages
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, *options], cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=3100
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.timeout(3200)
def test_every_stage_completes_without_the_packages_of_the_service(quick_run: Path) -> None:
    lines = lines_of(quick_run)

    ends = {line["stage"]: line["value"] for line in lines if line["name"] == "stage"}
    assert ends == dict.fromkeys(run.STAGES, "complete")
    assert [line for line in lines if "traceback" in line] == []
    assert all(line["unit"] and line["name"] for line in lines)
    page = (quick_run / "kit.md").read_text()
    assert all(f"## {stage}\n" in page for stage in run.STAGES)


@pytest.mark.timeout(3200)
def test_stages_have_results_and_name_what_needs_a_gpu(quick_run: Path) -> None:
    lines = lines_of(quick_run)

    missing = [line for line in lines if line["value"] == "needs CUDA"]
    assert all(line["reason"] for line in missing)
    for stage in run.STAGES:
        assert any(line["stage"] == stage and isinstance(line["value"], float) for line in lines) or stage == "kernels"
    packed = [line for line in lines if line["name"].endswith("packed against alone")]
    assert len(packed) == 2 * len(quick().properties or ())
    assert all(line["value"] < 1e-4 for line in packed)
    recomputed = [line for line in lines if line["name"].endswith(", recomputed blocks")]
    assert recomputed
    assert all(line["bits_equal"] for line in recomputed)
    assert max(map(lines.index, recomputed)) < min(map(lines.index, packed)), "those of all base models are first"
    rates = {line["name"]: line for line in lines if line["stage"] == "compare_small" and line["unit"] == "tokens/s"}
    turns = {name: line for name, line in rates.items() if ", turn 1" in name}
    tokens = {round(line["value"] * line["seconds"], -1) for name, line in turns.items() if "one tick" in name}
    tokens |= {round(line["value"] * line["seconds"], -1) for name, line in turns.items() if "PEFT" in name}
    assert len(tokens) == 2  # contenders of many jobs compute the same tokens, and so does the one of one job
    assert {name for name, line in turns.items() if "recomputed_ticks" in line} == {
        name for name in turns if name.startswith("Lorry")
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_are_checked_in_the_interpreter(tmp_path: Path) -> None:
    try:
        interpreter = environment(TRITON_INTERPRET="1")
    except Missing as missing:
        pytest.skip(str(missing))
    options = ["--quick", "--out", str(tmp_path), "--only", "kernels", "--seconds", "600"]
    command_line = [sys.executable, "-m", "benchmarks.gpu.kit", *options]

    subprocess.run(command_line, cwd=ROOT, env=interpreter, capture_output=True, text=True, check=True)

    lines = lines_of(tmp_path)
    assert [line for line in lines if "traceback" in line] == []
    errors = [line["value"] for line in lines if line["unit"] == "fraction of the largest number"]
    assert len(errors) > 20
    assert max(errors) < 1e-5
    counts = [line for line in lines if line["unit"].startswith("of ")]
    assert counts
    assert all(line["unit"] == f"of {line['value']} segments" for line in counts)


def test_attention_is_compared_by_sequence(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setattr(flash, "kernel", lambda: stand_in)

    check_attention(kit)

    lines = [line for line in lines_of(tmp_path) if line["name"].endswith(" tokens")]
    assert len(lines) == 2 * len(kit.sizes.sequences)
    assert all(line["value"] < 2e-2 for line in lines)


def test_zero_gradients_of_a_sequence_of_one_token_are_no_false_alarm(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = StandIn()
    monkeypatch.setattr(flash, "kernel", lambda: stand_in)
    attended = kernels._attended

    def rounded(inputs: list[torch.Tensor], lengths: Any, *others: Any) -> list[torch.Tensor]:
        y, *gradients = attended(inputs, lengths, *others)
        return [y, *(gradient + 1e-3 for gradient in gradients)]  # as a kernel that subtracts two equal sums

    monkeypatch.setattr(kernels, "_attended", rounded)

    check_attention(kit)

    (line, _) = (line for line in lines_of(tmp_path) if line["name"].endswith(" 1 tokens"))
    assert line["value"] < 2e-2
    assert "inf" not in line["y_dq_dk_dv"]


# PEFT reads an attribute of transformers under a name that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_contenders_train_on_the_same_tokens_and_leave_the_base_unchanged(kit: Kit) -> None:
    base = build(TOY, device="cpu")
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    load = replace(kit.sizes.many, num_jobs=1)

    with adapted(base, rank=4) as model:
        assert any("lora_A" in name for name, _ in model.named_parameters())
    turns = [lorry(kit, base, load, kit.sizes.budgets), peft_loop(kit, base, load)]

    assert turns[0].tokens == turns[1].tokens
    after = dict(base.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_base_is_restored_if_the_deadline_passes_while_peft_adapts_it(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build(TOY, device="cpu")
    before, attributes = dict(base.model.named_modules()), set(vars(base.model))
    adapt = peft.get_peft_model

    def interrupted(*args: Any, **kwargs: Any) -> None:
        adapt(*args, **kwargs)
        raise StageOver

    monkeypatch.setattr(peft, "get_peft_model", interrupted)
    with pytest.raises(StageOver), adapted(base, rank=4):
        pass

    assert dict(base.model.named_modules()) == before
    assert set(vars(base.model)) == attributes
    assert not base.model.training
    assert not any(weight.requires_grad for weight in base.model.parameters())


def test_ratio_is_that_of_the_turns_that_both_contenders_completed(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.sizes = replace(kit.sizes, repeats=3)
    turns = {"lorry": 0, "peft_loop": 0, "peft_trainer": 0}

    def taken(name: str, kit: Kit, base: Any, load: Load, *_: Any) -> Turn:
        turns[name] += load.num_jobs > 1
        if name == "peft_loop" and turns[name] == 1:
            raise torch.OutOfMemoryError
        return Turn(tokens=100, seconds={"lorry": 1.0, "peft_loop": 2.0, "peft_trainer": 4.0}[name], loss=1.0)

    for name in turns:
        monkeypatch.setattr(comparisons, name, partial(taken, name))

    comparisons.small(kit)

    ratios = [line for line in lines_of(tmp_path) if line["unit"] == "times"]
    of_loop = [line for line in ratios if line["name"].startswith("Lorry, 3 jobs over PEFT in a loop")]
    assert [(line["value"], line["turns"]) for line in of_loop] == [(2.0, 1), (2.0, 2)]


# PEFT reads an attribute of transformers under a name that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_every_measured_shape_was_computed_before_by_the_same_contender(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, plans and allocations for a new shape would be measured."""
    load = replace(full().many, shortest=8, longest=60)
    budgets = Budgets(tick_tokens=TICK_TOKENS // 8, job_tokens=JOB_TOKENS // 8, slice_tokens=SLICE_TOKENS // 8)
    kit.sizes = replace(kit.sizes, many=load, budgets=budgets, repeats=1)
    met: dict[tuple[Any, ...], list[list[tuple[int, ...]]]] = {}
    """By contender, the shapes before, within and after the measured step of each of its turns."""
    current: list[list[tuple[int, ...]]] = [[]]

    def watched(contender: Callable[..., Turn]) -> Callable[..., Turn]:
        def take(kit: Kit, base: Any, *load: Any) -> Turn:
            nonlocal current
            current = met.setdefault((contender.__name__, *load), [])
            current.append([])
            return contender(kit, base, *load)

        return take

    for contender in (lorry, peft_loop, comparisons.peft_trainer):
        monkeypatch.setattr(comparisons, contender.__name__, watched(contender))
    monkeypatch.setattr(kit, "synchronize", lambda: current.append([]))  # called before and after the measured step
    embedding = kit.base(TOY).model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _module, inputs: current[-1].append(tuple(inputs[0].shape)))

    comparisons.compare(kit, TOY)

    assert len(met) == 6
    for contender, parts in met.items():
        *before, measured, after = parts  # the last turn is the one that is recorded, since there is one round
        assert measured
        assert after == []
        assert {*measured} <= {shape for part in before for shape in part}, contender


def test_lora_in_float32_is_left_out_on_a_gpu_where_no_engine_computes_it_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = Kit(log=Log(tmp_path, started=time.monotonic()), sizes=full(), stage="kernels")
    checked: list[tuple[str, torch.dtype]] = []
    for name in ("_lora", "_tiled_attention", "_decoding"):
        monkeypatch.setattr(
            kernels, name, lambda kit, dtype, *_, name=name, **__: checked.append((name.lstrip("_"), dtype))
        )
    monkeypatch.setattr(kernels, "elementwise_results", lambda device, dtype: checked.append(("rows", dtype)) or [])
    monkeypatch.setattr(kernels, "check_attention", lambda kit: None)
    monkeypatch.setattr(kernels, "TIMES", dict.fromkeys(kernels.TIMES, ()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    kernels.kernels(kit)

    assert {dtype for name, dtype in checked if name == "lora"} == {torch.bfloat16}
    for other in ("rows", "tiled_attention", "decoding"):
        assert {dtype for name, dtype in checked if name == other} == {torch.bfloat16, torch.float32}


def test_ceilings_are_measured_before_kernels_are_compiled() -> None:
    assert list(run.STAGES)[:3] == ["facts", "compilation", "kernels"]
    assert sum(stage.share for stage in run.STAGES.values()) == 480


def test_datasheet_flops_are_found_by_card_name_and_none_if_unknown() -> None:
    assert datasheet_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert datasheet_flops("NVIDIA H100 PCIe") == 756e12
    assert datasheet_flops("NVIDIA Unheard Of") is None


def test_failing_stage_is_recorded_and_the_next_one_runs(kit: Kit, tmp_path: Path) -> None:
    def fails(_: Kit) -> None:
        raise ValueError("no such kernel")

    run.run_stage(kit, "first", fails, until=time.monotonic() + 60)
    run.run_stage(kit, "second", lambda kit: kit.tell("figure", float("nan"), "s"), until=time.monotonic() + 60)

    first, figure, second = lines_of(tmp_path)
    assert (first["stage"], first["value"]) == ("first", "failed: ValueError")
    assert "no such kernel" in first["traceback"]
    assert (figure["value"], second["value"]) == ("nan", "complete")
    assert "no such kernel" in (tmp_path / "kit.md").read_text()


def test_stage_stops_at_its_deadline_and_keeps_its_results(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "LEAST_SECONDS", 60)

    def endless(kit: Kit) -> None:
        kit.tell("figure", 1.5, "s")
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
        with kit.attempt("a part that swallows exceptions"):
            signal.raise_signal(signal.SIGALRM)  # as the timer does at the deadline
            while True:
                time.sleep(0.001)

    run.run_stage(kit, "endless", endless, until=time.monotonic())

    assert [line["value"] for line in lines_of(tmp_path)] == [1.5, "stopped at its deadline"]


def test_results_append_to_those_of_an_earlier_run_without_its_torn_line(tmp_path: Path) -> None:
    Log(tmp_path, started=0.0).record("facts", "one", 1, "count")
    with (tmp_path / "kit.jsonl").open("a") as file:
        file.write('{"second": 3, "sta')

    log = Log(tmp_path, started=0.0)
    log.record("facts", "two | three", 2, "count", place="a\nb")
    log.write_page()

    assert [line["name"] for line in lines_of(tmp_path)] == ["one", "two | three"]
    page = (tmp_path / "kit.md").read_text()
    assert "| one | 1 | count |" in page
    assert "| two \\| three | 2 | count | place: a b |" in page


def test_constants_are_those_of_the_service() -> None:
    assert memory.MOST_JOB_TOKENS["cuda"] == JOB_TOKENS
    assert memory.SLICE_TOKENS["cuda"] == SLICE_TOKENS
    assert memory.TICK_TOKENS["cuda"] == TICK_TOKENS


def test_estimate_of_kept_bytes_is_that_of_the_service() -> None:
    base = build(replace(TOY, key_heads=1), device="cpu")
    shapes: dict[str, list[Any]] = {}
    linears: dict[str, Any] = dict(find_linears(base.model))
    for name, linear in linears.items():
        last = name.rpartition(".")[2]
        count = shapes.get(last, [0, 0])[1]
        shapes[last] = [list(linear.weight.shape), count + 1]

    assert kept_bytes_per_token(base) == memory.activation_bytes_per_token(shapes, "bfloat16")
    base.device = "cuda:0"
    assert kept_bytes_per_token(base) == memory.activation_bytes_per_token(shapes, "bfloat16", "torch")
    base.attachment = cast(Any, SimpleNamespace(kernels=Kernels(elementwise="compiled")))
    assert kept_bytes_per_token(base) == memory.activation_bytes_per_token(shapes, "bfloat16", "cuda")


def test_environment_of_torch_is_that_of_the_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command.os, "environ", {})

    command.prepare_environment(tmp_path)

    of_service = {name: value for name, value in launcher.CUDA.items() if name != "CUDA_DEVICE_ORDER"}
    assert command.os.environ.items() >= of_service.items()


@pytest.mark.parametrize(
    ("options", "text"), [([], "needs a CUDA GPU"), (["--quick", "--only", "nothing"], "Unknown stages: nothing")]
)
def test_unusable_call_is_rejected_with_a_remedy(
    tmp_path: Path,
    options: list[str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = tmp_path / "progress.json"
    Progress(path=progress).write()
    monkeypatch.setenv(PROGRESS, str(progress))
    monkeypatch.setattr(run, "has_gpu", lambda: False)
    monkeypatch.setattr(command, "prepare_environment", lambda scratch: None)
    monkeypatch.setattr(sys, "argv", ["kit", "--out", str(tmp_path / "out"), *options])

    with pytest.raises(SystemExit) as refused:
        command.main()

    assert refused.value.code == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
