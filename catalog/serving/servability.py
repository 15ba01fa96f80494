"""Predicts how a job's adapter can be used: with PEFT, with vLLM, and merged into its base model. Pure functions.

A rule is one entry of a table: when it applies, its verdict and its explanation. Comments name the source of each rule.
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
"""Allowed values of --max-lora-rank: MaxLoRARanks in vllm/config/lora.py (v0.10 to v0.27)."""
VLLM_USUAL_RANK = 16
"""Default of --max-lora-rank."""
VLLM_WITHOUT_LORA = frozenset(
    {"GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoXForCausalLM", "HrmTextForCausalLM", "StableLmForCausalLM"}
)
"""Trainable architectures that vLLM serves by a class without SupportsLoRA (vllm/model_executor/models, v0.32).
GPT-NeoX has none up to v0.31. v0.32 serves it through transformers, and docs/models/supported_models.md lists no LoRA
for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingTarget:
    """The adapter to be served."""

    spec: JobSpec
    ranks: tuple[int, ...]
    """Ranks of the adapted layers as exported. A PiSSA or OLoRA initialization doubles the exported rank."""
    architecture: str | None = None
    """Class of the base model in transformers. None: unknown."""

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
    """The answer for one server: the worst verdict of the rules that apply, and the reasons of all of them."""

    verdict: Servability
    reasons: tuple[str, ...]


def of_job(spec: JobSpec, ranks: Collection[int], *, architecture: str | None = None) -> dict[Server, Answer]:
    """Return the answers for a job. ranks: the rank of each adapted layer during training. architecture: of the base
    model."""
    exported = tuple(_times(spec) * rank for rank in ranks)
    made = ServingTarget(spec=spec, ranks=exported, architecture=architecture)
    return {server: _answer(server, made) for server in ("peft", "vllm", "merge")}


def why_not_vllm(spec: JobSpec, *, architecture: str | None, max_rank: int | None = None) -> str | None:
    """Return why vLLM can't serve the adapter of a job, as sentences, or None if it can.

    max_rank: --max-lora-rank of the server. None: the server can be started with any.
    """
    answer = of_job(spec, [spec.lora.rank], architecture=architecture)["vllm"]
    if answer.verdict == "no":
        return " ".join(reason for reason in answer.reasons if not reason.startswith("Start vLLM"))
    rank = exported_rank(spec)
    if max_rank is not None and rank > max_rank:
        return (
            f"The adapter has rank {rank}, but the server loads at most rank {max_rank}. Use a lower rank, or ask an "
            f"operator to start vLLM with --max-lora-rank {rank} or higher, and to register the endpoint again with "
            "that --max-rank."
        )
    return None


def exported_rank(spec: JobSpec) -> int:
    """Return the highest rank of the exported adapter."""
    return _times(spec) * max([spec.lora.rank, *(spec.lora.rank_pattern or {}).values()])


def _times(spec: JobSpec) -> int:
    return 2 if spec.lora.begins_with_the_base else 1


def _answer(server: Server, made: ServingTarget) -> Answer:
    found = [rule for rule in RULES if rule.server == server and rule.applies(made)]
    verdict: Servability = "yes"
    for rule in found:
        if WORST.index(rule.verdict) < WORST.index(verdict):
            verdict = rule.verdict
    return Answer(verdict=verdict, reasons=tuple(rule.reason(made) for rule in found))


def _vllm_rank(made: ServingTarget) -> str:
    wanted = vllm_rank(made.highest_rank)
    return f"The adapter has rank {made.highest_rank}: start vLLM with --max-lora-rank {wanted} (default: 16)."


def vllm_rank(highest_rank: int) -> int:
    """Return the smallest value of --max-lora-rank that suffices, or the greatest one."""
    return next((rank for rank in VLLM_RANKS if rank >= highest_rank), VLLM_RANKS[-1])


def _ranks_differ(made: ServingTarget) -> bool:
    """Whether layers may have different scales: then one scale for all layers is wrong."""
    return len(set(made.ranks)) > 1 or bool(made.spec.lora.alpha_pattern) or bool(made.spec.lora.rank_pattern)


RULES: tuple[Rule, ...] = (
    # Each export is verified with PEFT before its job succeeds.
    Rule(
        server="peft",
        verdict="yes",
        applies=lambda made: True,
        reason=lambda made: "The export has PEFT's layout, and a job succeeds only after PEFT has loaded the export.",
    ),
    Rule(
        server="peft",
        verdict="with_settings",
        applies=lambda made: made.spec.quantization != "none",
        reason=lambda made: (
            f"The adapter is trained on a base model quantized to {made.spec.quantization}. Load the base model the "
            "same way (bitsandbytes), or the outputs differ by the quantization error."
        ),
    ),
    # PEFTHelper in vllm/lora/peft_helper.py rejects use_dora ("vLLM does not yet support DoRA").
    Rule(
        server="vllm",
        verdict="no",
        applies=lambda made: made.spec.lora.use_dora,
        reason=lambda made: "vLLM does not support DoRA. Serve the merged model, or omit use_dora.",
    ),
    Rule(
        server="vllm",
        verdict="no",
        applies=lambda made: made.architecture in VLLM_WITHOUT_LORA,
        reason=lambda made: (
            f"vLLM does not support LoRA for the architecture {made.architecture}. Serve the merged model, or choose "
            "another base model."
        ),
    ),
    # PEFTHelper reads r, lora_alpha and use_rslora, but neither pattern: all layers get the same scale.
    Rule(
        server="vllm",
        verdict="no",
        applies=_ranks_differ,
        reason=lambda made: (
            "vLLM ignores rank_pattern and alpha_pattern: it would load the adapter, but scale "
            "these layers wrongly. Merge the adapter, or use one rank and one alpha."
        ),
    ),
    Rule(
        server="vllm",
        verdict="no",
        applies=lambda made: made.highest_rank > VLLM_RANKS[-1],
        reason=lambda made: (
            f"The adapter has rank {made.highest_rank}, but vLLM supports at most {VLLM_RANKS[-1]}. Merge the adapter."
        ),
    ),
    Rule(
        server="vllm",
        verdict="with_settings",
        applies=lambda made: VLLM_USUAL_RANK < made.highest_rank <= VLLM_RANKS[-1],
        reason=_vllm_rank,
    ),
    # vLLM's examples/offline_inference/lora_with_quantization_inference.py. On the fly, vLLM quantizes only to nf4.
    Rule(
        server="vllm",
        verdict="with_settings",
        applies=lambda made: made.spec.quantization == "nf4",
        reason=lambda made: (
            "The adapter is trained on a base model quantized to nf4. Start vLLM with --quantization bitsandbytes, or "
            "the outputs differ by the quantization error."
        ),
    ),
    Rule(
        server="vllm",
        verdict="with_settings",
        applies=lambda made: made.spec.quantization == "int8",
        reason=lambda made: (
            "The adapter is trained on a base model quantized to int8, but vLLM loads the base model in another form: "
            "the outputs differ by the quantization error."
        ),
    ),
    Rule(
        server="vllm",
        verdict="yes",
        applies=lambda made: True,
        reason=lambda made: (
            "Start vLLM with --enable-lora. It must support LoRA for the base model's architecture (SupportsLoRA)."
        ),
    ),
    # lora_core/model_files/merge.py computes the sum in fp32, rounds it once, and measures the rounding error.
    Rule(
        server="merge",
        verdict="with_settings",
        applies=lambda made: made.spec.quantization != "none",
        reason=lambda made: (
            f"The adapter is trained on a base model quantized to {made.spec.quantization}, but can only be merged "
            "into the unquantized weights (--dequantize). The merged model differs from the trained one by the "
            "quantization error, which the merge measures."
        ),
    ),
    Rule(
        server="merge",
        verdict="yes",
        applies=lambda made: made.spec.precision == "float32" and made.spec.quantization == "none",
        reason=lambda made: "W + BA is computed in fp32. A merged model that is stored in fp32 has no rounding error.",
    ),
    Rule(
        server="merge",
        verdict="yes",
        applies=lambda made: made.spec.precision != "float32" and made.spec.quantization == "none",
        reason=lambda made: (
            "W + BA is computed in fp32 and rounded once to the base model's dtype. The merge measures the rounding "
            "error, and fails if it is significant."
        ),
    ),
)
"""Several rules may apply to one server."""
