"""The trials accept kernels that agree with the reference, name what differs otherwise, and try what ships."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_core.kernels.gpu import elementwise_trial, segmented_lora, trials
from lora_core.kernels.gpu.tables import class_of
from lora_core.kernels.gpu.trials import TRIED, run_of
from tests.lora_core.kernels.gpu.compile_kernels import Configuration, of_lora, of_losses, of_rows
from tests.lora_core.kernels.gpu.compile_kernels import of_steps as of_adamw_steps
from tests.lora_core.kernels.gpu.launches import Launch, Variant, recorded

CPU = torch.device("cpu")
SIZES = ("WIDTH", "num_warps", "H", "HALF")
"""Constants that follow from the sizes of a base model. The trials use other sizes."""


def why_lora_differs() -> str | None:
    return trials.why_lora_differs.__wrapped__(CPU, torch.float32)


def test_agreeing_kernels_are_accepted() -> None:
    assert why_lora_differs() is None


@pytest.mark.parametrize(
    ("kernel", "by_b", "result"), [("expand", True, "y"), ("expand", False, "dx"), ("accumulate", True, "dB")]
)
def test_disagreeing_kernel_is_rejected_by_the_name_of_its_result(
    monkeypatch: pytest.MonkeyPatch, kernel: str, by_b: bool, result: str
) -> None:
    original = getattr(segmented_lora, kernel)
    monkeypatch.setattr(
        segmented_lora, kernel, lambda *args, **options: None if options["by_b"] is by_b else original(*args, **options)
    )

    reason = why_lora_differs()

    assert reason is not None
    assert f": {result} of the Triton kernels differs" in reason


def test_failing_kernel_is_rejected_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(segmented_lora, "shrink", fails)

    reason = why_lora_differs()

    assert reason is not None
    assert "no compiler" in reason
    assert "more" not in reason


def test_segment_in_a_run_of_another_class_is_noticed() -> None:
    ranks, thresholds = TRIED[1]
    siblings = [trials._segments(ranks, thresholds, 80, CPU, torch.float32)]
    x_TD, y_TO = torch.ones(80, trials.D), torch.zeros(80, 80)
    run = run_of(siblings, CPU)
    wrong = replace(run, group=replace(run.group, kind=class_of(16, has_dropout=True), launches={}))

    run.add([y_TO], x_TD)
    with pytest.raises(Exception, match="12 is no multiple of 8"):
        wrong.add([y_TO], x_TD)


def test_trial_of_lora_uses_every_variant_that_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = recorded(monkeypatch, runs=False)

    for _ in trials._differences(CPU, torch.float32, TRIED):
        pass

    assert {launch.variant for launch in launches} == {variant_of(shipped) for shipped in of_lora()}


def test_trial_of_steps_uses_every_variant_that_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {variant_of(configuration) for configuration in of_adamw_steps()}

    launches = elementwise_launches(monkeypatch)

    kernels = {kernel for kernel, _ in shipped}
    assert {launch.variant for launch in launches if launch.kernel in kernels} == shipped


def test_trial_of_rows_uses_every_kind_that_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {kind_of(*variant_of(configuration)) for configuration in [*of_rows(), *of_losses()]}

    launches = elementwise_launches(monkeypatch)

    kernels = {kernel for kernel, _ in shipped}
    assert {kind_of(*launch.variant) for launch in launches if launch.kernel in kernels} == shipped
    wide = {launch.kernel for launch in launches if "norm" in launch.kernel and launch.constants["num_warps"] > 1}
    assert wide == {kernel for kernel in kernels if "norm" in kernel}
    divisible = [launch for launch in launches if "logit" in launch.kernel]
    assert all(launch.properties["num_classes"] == (False, True) for launch in divisible), "as those of most models"


def elementwise_launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    launches = recorded(monkeypatch, runs=False)
    for dtype in elementwise_trial.TOLERANCE:
        for _ in elementwise_trial.elementwise_results(CPU, dtype):
            pass
    return launches


def variant_of(configuration: Configuration) -> Variant:
    return configuration.kernel.fn.__name__, frozenset(configuration.constants.items())


def kind_of(kernel: str, constants: frozenset[tuple[str, Any]]) -> Variant:
    """Return the variant without the sizes of a base model."""
    kind = {name: value > 0 if name == "REST" else value for name, value in constants if name not in SIZES}
    return kernel, frozenset(kind.items())
