"""Where the adapter of a job can be used once it is trained: by PEFT, by vLLM, and merged into its base. Pure.

A rule is one line of a table: where it applies, what it means, what to do. Their sources stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from catalog.spec.job import JobSpec

Servability = Literal["yes", "with_settings", "no"]
Server = Literal["peft", "vllm", "merge"]
WORST: tuple[Servability, ...] = ("no", "with_settings", "yes")

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be: MaxLoRARanks of vllm/config/lora.py (v0.10 to v0.27)."""
VLLM_USUAL_RANK = 16
"""Its default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingTarget:
    """What there will be to serve."""

    spec: JobSpec
    ranks: tuple[int, ...]
    """Of the adapted layers, as exported: one that began with a part of the base has twice the rank."""
    trains_head: bool = False
    """A head or embeddings of its own, PEFT's modules_to_save. No job can ask for one yet."""

    @property
    def highest_rank(self) -> int:
        return max(self.ranks, default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    server: Server
    verdict: Servability
    applies: Callable[[ServingTarget], bool]
    reason: Callable[[ServingTarget], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Of one server: the worst verdict of those rules that apply, and what they all say."""

    verdict: Servability
    reasons: tuple[str, ...]


def of_job(spec: JobSpec, ranks: Collection[int]) -> dict[Server, Answer]:
    """ranks: of each adapted layer, as it is trained."""
    times = 2 if spec.lora.begins_with_the_base else 1
    return judge(ServingTarget(spec=spec, ranks=tuple(times * rank for rank in ranks)))


def judge(made: ServingTarget) -> dict[Server, Answer]:
    return {server: _answer(server, made) for server in ("peft", "vllm", "merge")}


def _answer(server: Server, made: ServingTarget) -> Answer:
    found = [rule for rule in RULES if rule.server == server and rule.applies(made)]
    verdict: Servability = "yes"
    for rule in found:
        if WORST.index(rule.verdict) < WORST.index(verdict):
            verdict = rule.verdict
    return Answer(verdict=verdict, reasons=tuple(rule.reason(made) for rule in found))


def _vllm_rank(made: ServingTarget) -> str:
    wanted = next((rank for rank in VLLM_RANKS if rank >= made.highest_rank), VLLM_RANKS[-1])
    return f"Its rank is {made.highest_rank}: start vLLM with --max-lora-rank {wanted} (its default is 16)."


def _ranks_differ(made: ServingTarget) -> bool:
    """One scale for all layers is then not what was trained, whichever number differs."""
    return len(set(made.ranks)) > 1 or bool(made.spec.lora.alpha_pattern) or bool(made.spec.lora.rank_pattern)


RULES: tuple[Rule, ...] = (
    # PEFT loads what is exported before a job succeeds: it is what the export is verified with.
    Rule(
        server="peft",
        verdict="yes",
        applies=lambda made: True,
        reason=lambda made: "The export is in PEFT's layout, and a job succeeds only after PEFT has loaded it back.",
    ),
    Rule(
        server="peft",
        verdict="with_settings",
        applies=lambda made: made.spec.quantization != "none",
        reason=lambda made: (
            f"It is trained on the base as {made.spec.quantization}: load the base so (bitsandbytes), "
            "or the outputs differ by the quantization's error."
        ),
    ),
    # PEFTHelper of vllm/lora/peft_helper.py refuses use_dora ("vLLM does not yet support DoRA") and modules_to_save.
    Rule(
        server="vllm",
        verdict="no",
        applies=lambda made: made.spec.lora.use_dora,
        reason=lambda made: "vLLM does not support DoRA. Merge the adapter and serve that, or leave use_dora out.",
    ),
    Rule(
        server="vllm",
        verdict="no",
        applies=lambda made: made.trains_head,
        reason=lambda made: (
            "vLLM loads no adapter that has whole modules of its own (PEFT's modules_to_save). Merge it."
        ),
    ),
    # PEFTHelper reads r, lora_alpha and use_rslora and neither of the patterns: each layer gets the one scale.
    Rule(
        server="vllm",
        verdict="no",
        applies=_ranks_differ,
        reason=lambda made: (
            "vLLM does not read rank_pattern and alpha_pattern: it would load the adapter and scale "
            "those layers wrongly. Merge it, or use one rank and one alpha."
        ),
    ),
    Rule(
        server="vllm",
        verdict="no",
        applies=lambda made: made.highest_rank > VLLM_RANKS[-1],
        reason=lambda made: f"Its rank is {made.highest_rank}, and vLLM takes {VLLM_RANKS[-1]} at most. Merge it.",
    ),
    Rule(
        server="vllm",
        verdict="with_settings",
        applies=lambda made: VLLM_USUAL_RANK < made.highest_rank <= VLLM_RANKS[-1],
        reason=_vllm_rank,
    ),
    # vLLM's examples/offline_inference/lora_with_quantization_inference.py; on the fly it quantizes to nf4 alone.
    Rule(
        server="vllm",
        verdict="with_settings",
        applies=lambda made: made.spec.quantization == "nf4",
        reason=lambda made: (
            "It is trained on the base as nf4: start vLLM with --quantization bitsandbytes, or the outputs differ by "
            "the quantization's error."
        ),
    ),
    Rule(
        server="vllm",
        verdict="with_settings",
        applies=lambda made: made.spec.quantization == "int8",
        reason=lambda made: (
            "It is trained on the base as int8, and vLLM would hold the base otherwise: the outputs differ by the "
            "quantization's error."
        ),
    ),
    Rule(
        server="vllm",
        verdict="yes",
        applies=lambda made: True,
        reason=lambda made: (
            "vLLM must know the base's architecture and its layers (SupportsLoRA): start it with --enable-lora."
        ),
    ),
    # lora_core/model_files/merge.py computes the sum in fp32, rounds it once, and measures the rounding error.
    Rule(
        server="merge",
        verdict="with_settings",
        applies=lambda made: made.spec.quantization != "none",
        reason=lambda made: (
            f"It is trained on the base as {made.spec.quantization}, and merged only into the plain "
            "weights, with --dequantize: the result differs from what was trained by the quantization's error, which "
            "the merge measures."
        ),
    ),
    Rule(
        server="merge",
        verdict="yes",
        applies=lambda made: made.spec.precision == "float32" and made.spec.quantization == "none",
        reason=lambda made: "W + BA is summed in fp32, and nothing is lost where it is stored as that.",
    ),
    Rule(
        server="merge",
        verdict="yes",
        applies=lambda made: made.spec.precision != "float32" and made.spec.quantization == "none",
        reason=lambda made: (
            "W + BA is summed in fp32 and rounded once to the base's dtype; the merge measures what "
            "rounding took, and refuses where that shows."
        ),
    ),
)
"""Of each server any number may apply."""
