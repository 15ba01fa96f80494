// Where a job trains, or could: how the devices there hold its base model, why so, and what it needs of each.
import { html } from "../html.js";
import { Facts, Panel } from "../parts/basics.js";
import { devices, isOffloaded, strategyText } from "../parts/sharding.js";
import * as format from "../format.js";

/** By the job's `why`; nothing where that knows of none, or is still that of its last state. */
export function Placement({ job, why }) {
  const placements = (why?.state === job.status && why.placements) || [];
  if (!placements.length) return null;
  const isRunning = job.status === "running";
  return html`<${Panel} title=${isRunning ? "Its base on the devices" : "Where it could train"} id="placement">
    ${placements.map((one, index) => html`<div class="placement" key=${index}>
      ${!isRunning && html`<h3>${format.plural(one.num_workers, "worker")}${one.num_workers > 1 ? ", each" : ""} with ${devices(one.num_devices, one.kind)}</h3>`}
      <${Facts} rows=${facts(one)} /></div>`)}
  <//>`;
}

function facts({ kind, num_devices, strategy, reason, needed_bytes, memory_bytes, blocks }) {
  const where = num_devices > 1 ? "on each" : "in all";
  const whose = isOffloaded(strategy) ? "the host has for each device" : "each device has";
  return [
    ["Base model", strategyText({ strategy, number: num_devices, kind })],
    ["Why", reason],
    ["Blocks", blocks && `${format.count(blocks.count)}, in all ${format.bytes(blocks.bytes)}; ${whose} 1/${num_devices} of every one, ${format.bytes(blocks.share_bytes)}`],
    ["Blocks at work", blocks && `${format.bytes(blocks.gathered_bytes)} more on each, for those that are whole while they compute`],
    ["Memory needed", `about ${format.bytes(needed_bytes)} ${where}, of ${format.bytes(memory_bytes)}`],
  ];
}
