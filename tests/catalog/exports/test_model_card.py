"""The model card: metadata that the Hub reads, facts of the lineage record, and nothing private."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from catalog.exports.model_card import render, render_export
from catalog.spec.job import JobRequest, resolve
from lorry.cli.render.serving import loading_options
from lorry.models import Adapter
from tests.catalog.registry import test_lineage
from tests.catalog.registry.test_lineage import CANARY
from tests.catalog.world import DESCRIPTION

COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"


def record(*, request: dict[str, Any] | None = None, base: dict[str, Any] | None = None) -> dict[str, Any]:
    body = JobRequest.model_validate(
        {"model": "smol", "training_file": "file-1", "metadata": {"a": CANARY}} | (request or {})
    )
    job = test_lineage.job()
    job.spec = resolve(body, num_rows=100, max_positions=512, seed=7).model_dump(mode="json")
    about = {"description": {**DESCRIPTION, "license": "apache-2.0"}, "revision": COMMIT, **(base or {})}
    results = {
        "steps": 60,
        "kept_step": 60,
        "trained_tokens": 4_000,
        "evaluation": {"base_loss": 3.5, "loss": 2.25, "base_perplexity": 33.1, "perplexity": 9.49},
        "verification": {"passed": True, "max_abs_diff": 0.0125, "tolerance": 0.05},
        "determinism": "bitwise",
        "memory": {"peak_bytes": 123_456_789},
    }
    return test_lineage.record(job=job, base=test_lineage.base(**about), results=results)


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_hub_reads_the_metadata() -> None:
    card = render(record()).decode()

    assert card.startswith("---\n")
    assert metadata(card) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorry"],
    }


def test_a_base_model_of_a_folder_is_no_model_of_the_hub() -> None:
    card = render(record(base={"kind": "folder", "source": f"/srv/{CANARY}", "revision": None})).decode()

    assert "base_model" not in metadata(card)
    assert "`BASE_MODEL` is the folder or the Hub ID of the base model." in card
    assert 'from_pretrained("BASE_MODEL", dtype=torch.bfloat16)' in card
    assert CANARY not in card


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("acme community", {"license": "other", "license_name": "acme community"}),
        (None, {}),
    ],
)
def test_a_license_that_the_hub_does_not_know_is_other(given: str | None, fields: dict[str, str]) -> None:
    card = render(record(base={"description": {**DESCRIPTION, "license": given}})).decode()

    assert {name: value for name, value in metadata(card).items() if name.startswith("license")} == fields


def test_the_card_states_training_results_and_the_comparison_with_full_fine_tuning() -> None:
    card = render(record()).decode()

    for row in (
        "| Rank, alpha, dropout | 16, 32, 0 |",
        "| Optimizer steps | 60 |",
        "| Validation loss | 2.25 (base model: 3.5) |",
        "| Perplexity | 9.49 (base model: 33.1) |",
        "| Allowed difference | 0.05 |",
        "| Determinism level | bitwise |",
        f"| Revision of the base model | {COMMIT} |",
    ):
        assert row in card
    assert re.search(r"\| Trained parameters \| 4,884,480 of 10,000 ", card)
    assert re.search(r"\| Training memory, computed \| .* instead of .* \|", card)
    assert f'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", revision="{COMMIT}"' in card
    assert "--max-lora-rank 16 --lora-modules NAME=ADAPTER_FOLDER" in card


def test_equal_trainings_have_equal_cards_without_ids_times_or_measurements() -> None:
    first, second = record(), record()
    second["job"], second["people"]["finished_at"] = "ftjob-2", "2030-01-01T00:00:00.000Z"
    second["results"]["memory"] = {"peak_bytes": 1}
    second["attempts"] = second["attempts"][:1]

    assert render(first) == render(second)
    assert CANARY not in render(first).decode()


@pytest.mark.parametrize("hostile", ["a`b|c\n# Injected", "<script>alert(1)</script>", "---\nlicense: mit"])
def test_text_of_others_is_escaped(hostile: str) -> None:
    card = render(record(base={"source": hostile, "description": {**DESCRIPTION, "license": hostile}})).decode()

    assert "\n# Injected" not in card
    assert "<script>" not in card.split("```python")[0].split("---\n", 2)[2]
    assert metadata(card)["license"] == "other"
    assert card.count("\n## ") == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"request": {"lora": {"use_dora": True}}}, "vLLM can't load it:"),
        (
            {"base": {"description": {**DESCRIPTION, "architecture": "GPT2LMHeadModel"}}},
            "vLLM does not support LoRA for the architecture GPT2LMHeadModel",
        ),
    ],
)
def test_vllm_is_not_recommended_for_what_it_can_not_load(changes: dict[str, Any], reason: str) -> None:
    card = render(record(**changes)).decode()

    assert reason in card
    assert "vllm serve" not in card
    assert "Start vLLM" not in card


@pytest.mark.parametrize(("quantization", "flag"), [("none", ""), ("nf4", " --quantization bitsandbytes")])
def test_commands_load_the_base_model_as_in_training(quantization: str, flag: str) -> None:
    request = {"quantization": quantization, "precision": "bfloat16"}
    card = render(record(request=request)).decode()

    adapter = Adapter.of({"id": "adapter-1", "quantization": quantization, "precision": "bfloat16"})
    assert f'revision="{COMMIT}", {loading_options(adapter)})\n' in card
    assert ("import AutoModelForCausalLM, BitsAndBytesConfig\n" in card) is (quantization == "nf4")
    assert f"vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --revision {COMMIT}{flag} --enable-lora " in card


def test_a_doubled_rank_and_a_quantized_base_are_stated() -> None:
    card = render(record(request={"lora": {"rank": 24, "init_lora_weights": "pissa"}})).decode()
    quantized = render(record(request={"quantization": "nf4"})).decode()

    assert "--max-lora-rank 64" in card
    assert "The base model is loaded with the quantization nf4" in quantized


COST = {"base_seconds": 0.1, "merged_seconds": 0.098, "num_tokens": 128}
VERIFICATION = {"max_abs_diff": 0.0125, "tolerance": 0.05, "explanation": "93 of 93 weights match."}


@pytest.mark.parametrize(
    ("format", "library", "relation", "command"),
    [
        ("merged", "transformers", "finetune", "vllm serve MODEL_FOLDER"),
        ("gguf", "gguf", "finetune", "llama-server --model a-q8_0.gguf"),
        ("gguf-lora", "gguf", "adapter", "llama-server --model BASE_MODEL.gguf --lora a-q8_0.gguf"),
    ],
)
def test_the_card_of_an_export_has_the_four_numbers_with_the_measured_latency(
    format: str,  # noqa: A002
    library: str,
    relation: str,
    command: str,
) -> None:
    cost = None if format == "gguf-lora" else COST
    rendered = render_export(
        record(), format=format, gguf_name="a-q8_0.gguf", verification=VERIFICATION, cost=cost
    ).decode()

    found = metadata(rendered)
    assert (found["library_name"], found["base_model_relation"]) == (library, relation)
    assert re.search(r"\| Trained parameters \| 4,884,480 of 10,000 \(.*%\) \|", rendered)
    assert re.search(r"\| Size of the weights \| .* of .* \(.*%\) \|", rendered)
    assert re.search(r"\| Training memory, computed \| .* instead of .* \(.*%\) \|", rendered)
    for component in ("weights", "gradients", "optimizer state", "activations"):
        assert re.search(rf"\| Memory: {component} \| .* instead of .* \|", rendered)
    latency = "| Inference latency, merged | 98 ms instead of 100 ms (98%), for a pass over 128 tokens on a CPU |"
    assert (latency in rendered) is (cost is not None)
    assert "## Verification of this export\n\n| | |\n|---|---|\n| Largest difference of a logit | 0.0125 |" in rendered
    assert "| Comparison | 93 of 93 weights match. |" in rendered
    assert command in rendered
    assert CANARY not in rendered
