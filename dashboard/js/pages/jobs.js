// The list of jobs: running trainers, then every job with its state, progress, loss and time left.
import { html, useState } from "../html.js";
import { link, replaceQuery, route } from "../router.js";
import { Ago, Empty, FINAL, Failure, Loading, State, Until } from "../parts/basics.js";
import { Bar, Sparkline, TOOK, done, epochDone, jobName, numSteps } from "../parts/progress.js";
import { PackedJobs } from "../parts/packed_jobs.js";
import { Place } from "../parts/waiting.js";
import { useResource } from "../resource.js";
import { useJobs } from "../jobs_data.js";
import * as format from "../format.js";

const FILTERS = [
  ["all", "All", () => true],
  ["active", "Active", (job) => !FINAL.has(job.status)],
  ["running", "Running", (job) => job.status === "running"],
  ["waiting", "Waiting", (job) => job.status === "queued" || job.status === "validating_files"],
  ["paused", "Paused", (job) => job.status === "paused"],
  ["succeeded", "Succeeded", (job) => job.status === "succeeded"],
  ["ended", "Failed or cancelled", (job) => job.status === "failed" || job.status === "cancelled"],
];
const ORDER = { running: 0, queued: 1, validating_files: 2, paused: 3 };
const MANY = 1e9;

export function JobsPage() {
  const { jobs, queue, curves, loading, error, hasMore, more, reload } = useJobs();
  const [filter, setFilter] = useState(() => ({
    state: route.get().query.get("state") || "all",
    text: route.get().query.get("find") || "",
  }));
  const choose = (change) => {
    const next = { ...filter, ...change };
    setFilter(next);
    replaceQuery({ state: next.state === "all" ? null : next.state, find: next.text });
  };
  const shown = sorted(jobs.filter((job) => matches(job, filter)), queue);
  return html`
    <div class="title"><h1 tabindex="-1">Jobs</h1><${Tally} jobs=${jobs} /></div>
    ${error && html`<${Failure} error=${error} retry=${reload} />`}
    <${Aboard} jobs=${jobs} />
    ${jobs.length > 0 && html`<${Filters} jobs=${jobs} filter=${filter} choose=${choose} />`}
    ${loading ? html`<${Loading} />` : jobs.length === 0 && !error
      ? html`<${NoJobs} />`
      : shown.length === 0 && !error ? html`<${Empty} title="No job matches." ><button type="button" onClick=${() => choose({ state: "all", text: "" })}>Show all jobs</button><//>`
      : html`<${JobsTable} jobs=${shown} curves=${curves} queue=${queue} />`}
    ${hasMore && html`<p class="more"><button type="button" onClick=${more}>Show older jobs</button></p>`}`;
}

/** The next command to run: submit a job on an available base model, or add a base model. */
function NoJobs() {
  const { data, loading } = useResource("/v1/models");
  if (loading) return html`<${Loading} />`;
  const base = data?.data.find((model) => model.kind === "base" && model.state === "ready");
  if (data && !base) {
    return html`<${Empty} title="No jobs and no base models yet." command="lorry models add NAME SOURCE">
      SOURCE is a Hub id, a folder with safetensors files, or a GGUF file.<//>`;
  }
  return html`<${Empty} title="No jobs yet." command=${`lorry jobs submit ${base?.id ?? "MODEL"} train.jsonl --valid validation.jsonl --watch`}>
    A job trains one adapter. Run this command in a terminal, or use the OpenAI client with the address of this service.<//>`;
}

function Tally({ jobs }) {
  const number = (test) => jobs.filter(test).length;
  const parts = FILTERS.slice(2, 6).map(([, name, test]) => [name.toLowerCase(), number(test)]).filter(([, value]) => value);
  if (!parts.length) return null;
  return html`<p class="tally">${parts.map(([name, value]) => html`<span key=${name}><b>${format.count(value)}</b> ${name}</span>`)}</p>`;
}

function Aboard({ jobs }) {
  const trainers = Map.groupBy(jobs.filter((job) => job.status === "running"), (job) => job.trainer_id || job.id);
  if (!trainers.size) return null;
  return html`<section class="beds" aria-labelledby="aboard">
    <h2 id="aboard" class="unseen">Training now</h2>
    ${[...trainers].map(([id, aboard]) => html`<${PackedJobs} key=${id} base=${aboard[0].model} jobs=${aboard} />`)}
  </section>`;
}

function Filters({ jobs, filter, choose }) {
  return html`<form class="filters" role="search" aria-label="Filter jobs" onSubmit=${(event) => event.preventDefault()}>
    <div class="chips" role="group" aria-label="State">
      ${FILTERS.map(([key, name, test]) => html`<button type="button" key=${key} class="chip" aria-pressed=${String(filter.state === key)}
        onClick=${() => choose({ state: key })}>${name} <span class="chip-count">${jobs.filter(test).length}</span></button>`)}
    </div>
    <label class="find"><span class="unseen">Search by name, id, base model or label</span>
      <input type="search" placeholder="Search by name, id, base or label" value=${filter.text} onInput=${(event) => choose({ text: event.currentTarget.value })} /></label>
  </form>`;
}

function matches(job, { state, text }) {
  const [, , test] = FILTERS.find(([key]) => key === state) || FILTERS[0];
  if (!test(job)) return false;
  const labels = Object.entries(job.metadata || {}).map(([key, value]) => `${key}=${value}`);
  const words = [job.id, jobName(job), job.model, job.training_file, job.fine_tuned_model, ...labels].join(" ").toLowerCase();
  return text.toLowerCase().split(/\s+/).every((word) => words.includes(word));
}

/** Running jobs first, then waiting jobs by queue position, then the others, newest first. */
function sorted(jobs, queue) {
  const position = (job) => (job.status === "queued" ? queue[job.id]?.position ?? MANY : MANY);
  return [...jobs].sort((a, b) => (ORDER[a.status] ?? 4) - (ORDER[b.status] ?? 4) || position(a) - position(b) || b.created_at - a.created_at);
}

function JobsTable({ jobs, curves, queue }) {
  return html`<table class="table jobs" role="table">
    <caption class="unseen">Jobs, running and waiting ones first</caption>
    <thead role="rowgroup"><tr role="row">
      <th role="columnheader" scope="col">Job</th><th role="columnheader" scope="col">State</th><th role="columnheader" scope="col">Progress</th>
      <th role="columnheader" scope="col">Loss</th><th role="columnheader" scope="col">ETA / finished</th>
    </tr></thead>
    <tbody role="rowgroup">${jobs.map((job) => html`<${Row} key=${job.id} job=${job} points=${curves[job.id]} entry=${queue[job.id]} />`)}</tbody>
  </table>`;
}

function Row({ job, points, entry }) {
  return html`<tr role="row">
    <th role="rowheader" scope="row" class="job-name">
      <a href=${link.job(job.id)}>${jobName(job)}</a>
      <span class="sub"><span>${job.model}</span>${job.lora && html`<span>rank ${job.lora.rank}</span>`}<span><${Ago} at=${job.created_at} /></span></span>
    </th>
    <td role="cell" class="job-state"><${State} job=${job} /></td>
    <td role="cell" class="job-progress"><${Progress} job=${job} entry=${entry} /></td>
    <td role="cell" class="job-loss"><${Loss} job=${job} points=${points} /></td>
    <td role="cell" class="job-done"><${Done} job=${job} /></td>
  </tr>`;
}

function Progress({ job, entry }) {
  if (job.status === "failed") return html`<span class="sub bad-text clamp">${job.error?.message || "No reason was recorded."}</span>`;
  if (job.status === "queued" || job.status === "validating_files") return html`<${Place} job=${job} entry=${entry} />`;
  if (done(job) === null) return html`<span class="sub">${job.status === "running" ? "Loading the base model and the data." : "Training had not started."}</span>`;
  const epoch = job.progress?.step ? epochDone(job) : undefined;
  return html`<${Bar} job=${job} /><span class="sub"><span>${format.count(job.progress?.step)} / ${format.count(numSteps(job))} steps</span>
    ${epoch !== undefined && html`<span>epoch ${epoch.toFixed(2)}</span>`}</span>`;
}

function Loss({ job, points }) {
  const train = job.progress?.loss ?? points?.at(-1)?.loss;
  const validLoss = job.progress?.kept_valid_loss ?? job.progress?.valid_loss;
  const values = [["validation", validLoss], ["train", train]].filter(([, value]) => typeof value === "number");
  if (!values.length) return null;
  return html`<span class="loss"><${Sparkline} points=${points} label=${`Training loss of ${jobName(job)}`} />
    <span class="losses">${values.map(([name, value], index) => html`<span class="soft" key=${name}>${name}</span>${index ? html`<span>${format.loss(value)}</span>` : html`<b>${format.loss(value)}</b>`}`)}</span></span>`;
}

function Done({ job }) {
  if (job.status === "running") return html`<${Until} seconds=${job.progress?.seconds_left} /><span class="sub">${format.rate(job.progress?.tokens_per_second)}</span>`;
  if (job.finished_at) return html`<${Ago} at=${job.finished_at} />${job.seconds_running > 0 && html`<span class="sub" title=${TOOK}>took ${format.duration(job.seconds_running)}</span>`}`;
  return null;
}
