// The list of workers: state, devices, loaded base model and running jobs.
import { html, useEffect } from "../html.js";
import { browserSession } from "../api.js";
import { useStore } from "../store.js";
import { useJobs } from "../jobs_data.js";
import { useResource } from "../resource.js";
import { Ago, Empty, Facts, Failure, Id, Loading } from "../parts/basics.js";
import { PackedJobs } from "../parts/packed_jobs.js";
import { strategyText, wantedStrategyText } from "../parts/sharding.js";
import { WorkerActions } from "./worker_actions.js";
import * as format from "../format.js";

const READ_MS = 5000;

export function WorkersPage() {
  const { data, error, loading, reload } = useResource("/v1/workers");
  const { jobs } = useJobs();
  useEffect(() => {
    const timer = setInterval(() => { if (!document.hidden) reload(); }, READ_MS);
    return () => clearInterval(timer);
  }, []);
  useEffect(() => { reload(); }, [jobs]);
  const workers = data?.data || [];
  return html`
    <div class="title"><h1 tabindex="-1">Workers</h1></div>
    ${error && html`<${Failure} error=${error} retry=${reload} />`}
    ${loading ? html`<${Loading} />` : workers.length ? html`<div class="workers">${workers.map((worker) => html`<${Worker} key=${worker.id} worker=${worker} jobs=${jobs} done=${reload} />`)}</div>`
      : !error && html`<${Empty} title="No worker is running." command="lorry up">Jobs wait until a worker runs. This command starts a service with one worker on this machine:<//>`}`;
}

const WORDS = { idle: "idle", busy: "training", draining: "draining", lost: "unreachable", ended: "stopped" };

const REPORT = { base_bytes: "Base model memory", adapter_bytes: "Adapter memory", peak_bytes: "Peak memory" };

function Worker({ worker, jobs, done }) {
  const isOperator = Boolean(useStore(browserSession)?.is_operator);
  const aboard = jobs.filter((job) => job.status === "running" && job.worker_id === worker.id);
  const title = worker.host || worker.id;
  const isIdle = worker.state === "idle";
  const isGone = worker.state === "lost" || worker.state === "ended";
  const facts = Object.entries(worker.report || {}).filter(([name, value]) => value !== null && typeof value !== "object" && !(isIdle && name === "tokens_per_second"));
  return html`<section class="panel worker" aria-labelledby=${`worker-${worker.id}`}>
    <div class="panel-head"><h2 id=${`worker-${worker.id}`}>${title}</h2>
      <span class=${`state worker-${worker.state}`}><span class="dot" aria-hidden="true"></span>${stateWords(worker)}</span></div>
    ${worker.cordon && worker.state !== "ended" && html`<p class="cordon">${cordonWords(worker.cordon)}</p>`}
    <${PackedJobs} base=${worker.resident_base_names.join(", ") || (worker.resident_base ? format.short(worker.resident_base, 16) : isGone ? "unknown (worker offline)" : "no base model loaded")} jobs=${aboard} />
    <${Facts} rows=${[
      ["Devices", worker.devices.map(device).join(", ")], ["Memory", worker.devices.some(memoryOf) ? null : format.bytes(worker.memory_bytes)],
      ...ofSeveral(worker),
      ["Last heartbeat", html`<${Ago} at=${worker.last_seen_at} />`], ["Started", html`<${Ago} at=${worker.started_at} />`],
      ["Trainer", worker.trainer_id && html`<${Id} id=${worker.trainer_id} what="trainer id" length=${20} />`],
      ["Base digest", worker.resident_base && html`<${Id} id=${worker.resident_base} what="base digest" length=${20} />`],
      ["Version", worker.version], ["PID", worker.pid && String(worker.pid)],
      ["Id", html`<${Id} id=${worker.id} what="worker id" length=${24} />`],
      ...facts.map(([name, value]) => [REPORT[name] || sentenceCase(name), reported(name, value)]),
    ]} />
    ${isOperator && html`<${WorkerActions} worker=${worker} done=${done} />`}
  </section>`;
}

function stateWords(worker) {
  const word = worker.state === "idle" && worker.resident_base ? "idle, base model loaded" : WORDS[worker.state] || worker.state;
  return worker.cordon && (worker.state === "idle" || worker.state === "busy") ? `${word}, cordoned` : word;
}

function cordonWords(cordon) {
  const actor = cordon.by === "service" ? "the service" : "an operator";
  return `Cordoned by ${actor}: the worker finishes its jobs and accepts no new ones. ${cordon.reason || ""}`.trim();
}

/** For several devices, of the worker or of its gang: the configured strategy, and the placement of the loaded base model. */
function ofSeveral({ devices, resident_base, report }) {
  const { kind, num_processes: number, strategy, gang } = devices[0] || {};
  if (gang) return [["Gang", gang], ["Placement strategy", wantedStrategyText("replicated")]];
  if (!(number > 1)) return [];
  const library = strategy?.startsWith("zero3") ? "zero3" : "fsdp2";
  const now = { replicated: "replicated", sharded: library, offloaded: `${library}_offload` }[report?.capacity?.holding];
  return [["Placement strategy", wantedStrategyText(strategy)], ["Base model placement", resident_base && now ? strategyText({ strategy: now, number, kind }) : null]];
}

const memoryOf = (one) => one?.memory_bytes ?? one?.total_bytes;

function device(one) {
  if (one === null || typeof one !== "object") return String(one);
  const memory = memoryOf(one);
  return [one.name || one.kind || one.id || "device", memory && `(${format.bytes(memory)})`].filter(Boolean).join(" ");
}

const sentenceCase = (key) => { const words = key.replaceAll("_", " "); return words[0].toUpperCase() + words.slice(1); };

const reported = (name, value) => (typeof value !== "number" ? String(value) : name.endsWith("_bytes") ? format.bytes(value) : format.power(value));
