// How a group of devices holds a base model, as text: replicated, sharded, or sharded and offloaded to host memory.
import * as format from "../format.js";

const LIBRARIES = { fsdp2: "FSDP2", zero3: "DeepSpeed ZeRO-3", fsdp2_offload: "FSDP2", zero3_offload: "DeepSpeed ZeRO-3" };
const AUTO = "auto: replicate if it fits, else shard, else shard and offload to CPU";

/** Whether the shards of the base model are in host memory. */
export const isOffloaded = (strategy) => strategy.endsWith("_offload");

const library = (strategy) => `(${LIBRARIES[strategy] || strategy})${isOffloaded(strategy) ? ", offloaded to CPU" : ""}`;

/** The devices of a group: its GPUs, or the processes that share a CPU. */
export const devices = (number, kind) => format.plural(number, ...(kind === "cuda" ? ["GPU"] : number === 1 ? ["CPU"] : ["process", "processes"]));

export function strategyText({ strategy, number, kind }) {
  const group = devices(number, kind);
  if (strategy !== "replicated") return `sharded across ${group} ${library(strategy)}`;
  return number === 1 ? `full copy on ${group}` : `replicated on ${group}`;
}

/** The configured strategy of a worker. */
export function wantedStrategyText(strategy) {
  if (strategy === "auto") return AUTO;
  if (strategy === "replicated") return "always replicated";
  return LIBRARIES[strategy] ? `always sharded ${library(strategy)}` : strategy;
}
