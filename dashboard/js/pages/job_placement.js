// Where a job trains or could train: the strategy that holds its base model there, its reason, and the needed memory.
import { html } from "../html.js";
import { Facts, Panel } from "../parts/basics.js";
import { devices, isOffloaded, strategyText } from "../parts/sharding.js";
import * as format from "../format.js";

/** The placements from the job's `why`; nothing if it has none, or still describes the previous state of the job. */
export function Placement({ job, why }) {
  const placements = (why?.state === job.status && why.placements) || [];
  if (!placements.length) return null;
  const isRunning = job.status === "running";
  return html`<${Panel} title=${isRunning ? "Base model placement" : "Possible placements"} id="placement">
    ${placements.map((one, index) => html`<div class="placement" key=${index}>
      ${!isRunning && html`<h3>${format.plural(one.num_workers, "worker")}${one.num_workers > 1 ? ", each" : ""} with ${devices(one.num_devices, one.kind)}</h3>`}
      <${Facts} rows=${facts(one)} /></div>`)}
  <//>`;
}

function facts({ kind, num_devices, strategy, reason, needed_bytes, memory_bytes, blocks }) {
  const per = num_devices > 1 ? " per device" : "";
  const where = isOffloaded(strategy) ? "in host memory for each device" : "on each device";
  return [
    ["Base model", strategyText({ strategy, number: num_devices, kind })],
    ["Why", reason],
    ["Blocks", blocks && `${format.count(blocks.count)}, ${format.bytes(blocks.bytes)} in total; 1/${num_devices} of every block ${where}, ${format.bytes(blocks.share_bytes)}`],
    ["Gathered blocks", blocks && `${format.bytes(blocks.gathered_bytes)} more per device while they compute`],
    ["Memory needed", `about ${format.bytes(needed_bytes)} of ${format.bytes(memory_bytes)}${per}`],
  ];
}
