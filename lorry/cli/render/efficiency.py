"""An adapter compared with full fine-tuning of its base model, in short lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorry.cli.render import output

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lorry.models import Efficiency

_COMPONENTS = ("weights", "gradients", "optimizer_state", "activations")


def efficiency_pairs(found: Efficiency | None) -> Iterator[tuple[str, object]]:
    """Yield labels and values: trained parameters, size, training memory by component, and latency."""
    if found is None:
        return
    parameters, size, memory = found.parameters, found.size, found.training_memory
    if parameters.get("share") is not None:
        yield "share of parameters", f"{percent(parameters['share'])} of the base model's {parameters['base']:,}"
    if size.get("share") is not None:
        share = f"{percent(size['share'])} of the base model's {output.size(size['base_bytes'])}"
        yield "size of the weights", f"{output.size(size['bytes'])}, {share}"
    if memory is not None:
        lora, full = memory["lora"], memory["full_fine_tuning"]
        yield "training memory", f"{_both(lora, full, 'total')} for full fine-tuning (computed)"
        for name in _COMPONENTS:
            yield f"  {name.replace('_', ' ')}", _both(lora, full, name)
        if memory.get("measured"):
            peak = output.size(memory["measured"]["peak_bytes"])
            yield "  peak of the trainer", f"{peak} (measured, with all its jobs)"
    latency = found.inference_latency
    yield (
        "latency when merged",
        "not measured: the export formats merged and gguf measure it"
        if latency is None
        else f"{latency['ratio']:.2f} times the base model's (measured by the last export)",
    )


def percent(share: float) -> str:
    """Return a share with two significant digits, without an exponent."""
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def _both(lora: Mapping[str, Any], full: Mapping[str, Any], name: str) -> str:
    return f"{output.size(lora[name])} instead of {output.size(full[name])}"
