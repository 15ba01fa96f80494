// How a group of devices holds a base model, in words: each the whole of it, or a share of every block.
import * as format from "../format.js";

const BY = { fsdp2: "torch", zero3: "DeepSpeed" };
const ALWAYS = { replicated: "always whole", fsdp2: "always divided, by torch (fsdp2)", zero3: "always divided, by DeepSpeed (zero3)" };
const AUTO = "whole where it fits each device, else divided";

/** Devices of a group: its GPUs; on a CPU the processes that share it. */
export const devices = (number, kind) => format.plural(number, ...(kind === "cuda" ? ["GPU"] : number === 1 ? ["CPU"] : ["process", "processes"]));

export function held({ strategy, number, kind }) {
  const group = devices(number, kind);
  if (strategy !== "replicated") return `divided among ${group}, by ${BY[strategy] || "another library"} (${strategy})`;
  return number === 1 ? `whole, on ${group}` : `whole, on each of ${group}`;
}

/** What a worker was told of the bases that it is to hold. */
export const wanted = (strategy) => (strategy === "auto" ? AUTO : ALWAYS[strategy] || strategy);
