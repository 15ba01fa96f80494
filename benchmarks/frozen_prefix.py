"""Speedup from caching the activations of frozen lower blocks if a job adapts only upper ones: epochs with and without.

With P parameters in the blocks, H in the head, k of L blocks adapted and a fraction s of labels among tokens, a token
costs 2P + 2P k/L + 4H s FLOPs without the cache, and 4P k/L + 4H s with it, in epochs after the first.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from benchmarks.gate import Contender
from benchmarks.plan import Plan
from benchmarks.results import Result, median_of, median_ratio, shares
from lora_core.base_model.model import describe_base

SHARE_OF_ARITHMETIC = 0.85
"""Expected fraction of the ratio of FLOPs, which doesn't include attention, norms and optimizer."""
ALIKE = ("head and loss", "LoRA", "optimizer")
"""Parts that cost the same with and without the cache."""
CLOCKS = ("seconds", "cpu_seconds")
FLOPS_RATIO = "FLOPs of blocks and head, without / with cache"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Depth of the base model, and number of parameters in its blocks and its head."""

    depth: int
    blocks: int
    head: int

    def promised(self, *, upper: int, label_share: float) -> float:
        """Return the FLOPs without the cache divided by those with it."""
        share, head = upper / self.depth, 4 * self.head * label_share
        return (2 * self.blocks * (1 + share) + head) / (4 * self.blocks * share + head)


def run(plan: Plan) -> Result:
    shape = shape_of(plan)
    upper = max(1, round(plan.upper_share * shape.depth))
    sizes: dict[str, Any] = {"upper": upper, "rows": plan.prefix_rows}
    settings = plan.settings() | sizes | {"blocks": shape.depth, "targets": "all linears of the upper blocks"}
    result = Result(theme="frozen_prefix", settings=settings)
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(
                closing(
                    Contender(
                        "upper_blocks",
                        threads=1,
                        log=plan.folder / f"prefix-{name}.log",
                        keeps=name == "kept",
                        **plan.options(),
                        **sizes,
                    )
                )
            )
            for name in ("kept", "computed")
        }
        for name, contender in contenders.items():
            result.repeats[f"{name}_first"] = [contender.step()]
        for _ in range(plan.repeats):
            for name, contender in contenders.items():
                result.repeats.setdefault(name, []).append(contender.step())
    _conclude(result, shape, upper)
    return result


def explain(plan: Plan, result: Result) -> None:
    """Profile an epoch with the cache and one without."""
    sizes = {name: result.settings[name] for name in ("upper", "rows")}
    for name, keeps in (("later epoch, with cache", True), ("epoch, without cache", False)):
        log = plan.folder / "prefix-profile.log"
        options = {**plan.options(), **sizes, "keeps": keeps}
        with closing(Contender("upper_blocks_profiled", threads=1, log=log, **options)) as contender:
            report = contender.step()
        result.repeats[f"profiled, {name}"] = [report]
        result.profile += shares(name, report["parts"])
    kept, computed = (
        {share.part: share.seconds for share in result.profile if share.of == name}
        for name in dict.fromkeys(share.of for share in result.profile)
    )
    spared = 1 - sum(kept.values()) / sum(computed.values())
    by_flops = 1 - 1 / result.figure(FLOPS_RATIO)
    result.why.append(
        "Head, LoRA and optimizer, which the cache does not speed up, take "
        f"{sum(kept.get(part, 0.0) for part in ALIKE):.2f} s of the {sum(kept.values()):.2f} s with the cache and "
        f"{sum(computed.get(part, 0.0) for part in ALIKE):.2f} s of the {sum(computed.values()):.2f} s without. The "
        f"cache saves {spared:.0%} of an epoch's time and {by_flops:.0%} of its FLOPs."
    )


def shape_of(plan: Plan) -> Shape:
    description = describe_base(plan.workload.base)
    config = json.loads((plan.workload.base / "config.json").read_text("utf-8"))
    sizes = [rows * columns * count for (rows, columns), count in description["linear_shapes"].values()]
    return Shape(
        depth=description["num_layers"], blocks=sum(sizes), head=config["vocab_size"] * description["hidden_size"]
    )


def _conclude(result: Result, shape: Shape, upper: int) -> None:
    kept, computed = result.repeats["kept"], result.repeats["computed"]
    (first,) = result.repeats["kept_first"]
    assert [report["loss"] for report in kept] == [report["loss"] for report in computed], "the cache changes no bit"
    assert kept[-1]["computed_tokens"] == first["tokens"], "lower blocks run in the first epoch only"
    result.find("First epoch, with cache", first["seconds"], "s")
    result.find("Later epoch, with cache", median_of(kept, "seconds"), "s")
    result.find("Epoch, without cache", median_of(computed, "seconds"), "s")
    promised = shape.promised(upper=upper, label_share=first["labels"] / first["tokens"])
    without_head = shape.promised(upper=upper, label_share=0)
    result.find("FLOPs of the blocks, without / with cache: (2P + 2Pk/L) / (4Pk/L)", without_head, "x")
    result.find(FLOPS_RATIO, promised, "x")
    seconds, cpu = ([[report[clock] for report in side] for side in (computed, kept)] for clock in CLOCKS)
    result.find(
        "Speedup of a later epoch", median_ratio(*seconds), "x", goal=float(f"{SHARE_OF_ARITHMETIC * promised:.3g}")
    )
    result.find("Speedup of a later epoch, by CPU time", median_ratio(*cpu), "x")
    result.find("Cache size per token", kept[-1]["kept_bytes"] / first["tokens"], "bytes")
