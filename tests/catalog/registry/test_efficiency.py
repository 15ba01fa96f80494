"""The comparison with full fine-tuning: parameters, size, memory in training by component, and latency."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.registry import efficiency
from catalog.resources.memory import BYTES_PER_NUMBER, BaseModelMemory, JobMemory
from tests.catalog.world import linears

NUM_BASE, NUM_TRAINED = 1_000_000, 20_000
DESCRIPTION = {
    "num_parameters": NUM_BASE,
    "vocab_size": 100,
    "num_layers": 2,
    **linears(q_proj=([64, 64], 2), v_proj=([16, 64], 2)),
}


def record(**spec: Any) -> dict[str, Any]:
    settings = {
        "precision": "bfloat16",
        "lora": {"rank": 8},
        "optimizer": {"type": "adamw"},
        "evaluation": {"keep": "last", "samples": None},
        "batch_size": 8,
        **spec,
    }
    return {
        "base": {
            "description": DESCRIPTION,
            "files": [
                {"path": "config.json", "num_bytes": 900},
                {"path": "model-1.safetensors", "num_bytes": 1_500_000},
                {"path": "model-2.safetensors", "num_bytes": 500_000},
            ],
        },
        "outputs": {
            "num_parameters": NUM_TRAINED,
            "files": [
                {"path": "adapter_model.safetensors", "num_bytes": 40_000},
                {"path": "probe.safetensors", "num_bytes": 70_000},
            ],
        },
        "config": {"resolved": settings},
        "results": {"memory": {"base_bytes": 2_000_000, "adapter_bytes": 360_000, "peak_bytes": 9_000_000}},
    }


def of(found: dict[str, Any]) -> dict[str, Any]:
    numbers = efficiency.of_adapter(found)
    assert numbers is not None
    return numbers


def test_shares_count_the_trained_parameters_and_the_weights_files() -> None:
    found = of(record())

    assert found["parameters"] == {"trainable": NUM_TRAINED, "base": NUM_BASE, "share": 0.02}
    assert found["size"] == {"bytes": 40_000, "base_bytes": 2_000_000, "share": 0.02}


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_full_fine_tuning_with_adamw_takes_16_bytes_per_parameter(precision: str) -> None:
    full = of(record(precision=precision))["training_memory"]["full_fine_tuning"]

    states = full["weights"] + full["gradients"] + full["optimizer_state"]
    assert states == 16 * NUM_BASE
    assert full["total"] == states + full["activations"]
    width = BYTES_PER_NUMBER[precision]
    assert (full["weights"], full["gradients"]) == (width * NUM_BASE, width * NUM_BASE)


@pytest.mark.parametrize(("precision", "width"), [("bfloat16", 2), ("float32", 4)])
def test_memory_of_lora_is_the_frozen_base_and_the_state_of_the_adapter(precision: str, width: int) -> None:
    usage = of(record(precision=precision))["training_memory"]

    lora = usage["lora"]
    assert lora["weights"] == width * (NUM_BASE + NUM_TRAINED)
    assert lora["gradients"] == 4 * NUM_TRAINED
    assert lora["optimizer_state"] == (8 if precision == "float32" else 12) * NUM_TRAINED
    row_bytes = JobMemory(num_parameters=NUM_TRAINED).row_bytes(precision)
    assert lora["weights"] + lora["gradients"] + lora["optimizer_state"] == width * NUM_BASE + row_bytes
    assert lora["activations"] == usage["full_fine_tuning"]["activations"] > 0
    assert usage["share"] == lora["total"] / usage["full_fine_tuning"]["total"] < 1


def test_another_optimizer_and_a_quantized_base_change_only_lora() -> None:
    plain, other = (
        of(record(**fields))["training_memory"]
        for fields in ({}, {"optimizer": {"type": "adafactor"}, "quantization": "nf4"})
    )

    assert other["full_fine_tuning"] == plain["full_fine_tuning"]
    assert other["lora"]["optimizer_state"] < plain["lora"]["optimizer_state"]
    width = BYTES_PER_NUMBER["bfloat16"]
    base_bytes = BaseModelMemory(DESCRIPTION, "bfloat16", "nf4").weight_bytes()
    assert other["lora"]["weights"] == base_bytes + width * NUM_TRAINED
    assert other["lora"]["activations"] - plain["lora"]["activations"] == 64 * 64 * 2


def test_measured_memory_is_that_of_the_trainer() -> None:
    found, older = record(), record()
    del older["results"]["memory"]

    assert of(found)["training_memory"]["measured"]["peak_bytes"] == 9_000_000
    assert of(older)["training_memory"]["measured"] is None


def test_latency_is_null_until_an_export_was_measured() -> None:
    measured = efficiency.of_adapter(record(), cost={"base_seconds": 0.5, "merged_seconds": 0.51})

    assert of(record())["inference_latency"] is None
    assert measured is not None
    assert measured["inference_latency"] == {"base_seconds": 0.5, "merged_seconds": 0.51, "ratio": 1.02}


def test_records_without_a_description_of_the_base_model_have_no_numbers() -> None:
    bare, without_shapes = record(), record()
    bare["base"] = {}
    without_shapes["base"] = {"description": {"num_parameters": NUM_BASE}, "files": []}

    assert efficiency.of_adapter(bare) is None
    assert efficiency.of_adapter({}) is None
    assert of(without_shapes)["training_memory"] is None
    assert of(without_shapes)["size"] == {"bytes": 40_000, "base_bytes": None, "share": None}
