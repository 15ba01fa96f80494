// How a group of devices holds a base model, in words: each the whole of it, or a share of every block, there or in the
// memory of its host.
import * as format from "../format.js";

const BY = { fsdp2: "torch", zero3: "DeepSpeed", fsdp2_offload: "torch", zero3_offload: "DeepSpeed" };
const AUTO = "whole where it fits each device, else divided, and in the host's memory where only that fits";

/** Whether the host's memory has the shares of a divided base. */
export const isOffloaded = (strategy) => strategy.endsWith("_offload");

const how = (strategy) => `by ${BY[strategy] || "another library"} (${strategy})${isOffloaded(strategy) ? ", in the host's memory" : ""}`;

/** Devices of a group: its GPUs; on a CPU the processes that share it. */
export const devices = (number, kind) => format.plural(number, ...(kind === "cuda" ? ["GPU"] : number === 1 ? ["CPU"] : ["process", "processes"]));

export function strategyText({ strategy, number, kind }) {
  const group = devices(number, kind);
  if (strategy !== "replicated") return `divided among ${group}, ${how(strategy)}`;
  return number === 1 ? `whole, on ${group}` : `whole, on each of ${group}`;
}

/** What a worker was told of the bases that it is to hold. */
export function wantedStrategyText(strategy) {
  if (strategy === "auto") return AUTO;
  if (strategy === "replicated") return "always whole";
  return BY[strategy] ? `always divided, ${how(strategy)}` : strategy;
}
