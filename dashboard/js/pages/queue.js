// The queue: waiting jobs in the scheduler's order with its explanations, and running trainers.
import { html } from "../html.js";
import { link } from "../router.js";
import { useLive } from "../jobs_data.js";
import { useResource } from "../resource.js";
import { Ago, Empty, Failure, Loading, State } from "../parts/basics.js";
import { Place } from "../parts/waiting.js";
import { PackedJobs } from "../parts/packed_jobs.js";
import * as format from "../format.js";

export function QueuePage() {
  const { data, error, loading, reload } = useResource("/v1/queue");
  useLive(reload);
  const jobs = (data?.jobs || []).map(asJob);
  const waiting = jobs.filter((job) => job.status === "queued" || job.status === "validating_files");
  const running = jobs.filter((job) => job.status === "running");
  return html`
    <div class="title"><h1 tabindex="-1">Queue</h1>${data && html`<${Tally} data=${data} waiting=${waiting} running=${running} />`}</div>
    ${error && html`<${Failure} error=${error} retry=${reload} />`}
    ${loading ? html`<${Loading} />` : html`
      ${waiting.length ? html`<${Rules} /><${WaitingTable} jobs=${waiting} />` : !error && html`
        <${Empty} title="No jobs are waiting." command="lorry jobs submit MODEL train.jsonl">A new job starts as soon as a worker has free memory for it.<//>`}
      <${Training} jobs=${running} />`}`;
}

/** A queue entry with the field names of a job object. */
const asJob = (entry) => ({ ...entry, id: entry.job_id, status: entry.state, model: entry.base_model });

const Tally = ({ data, waiting, running }) => html`<p class="tally"><span><b>${format.count(waiting.length)}</b> waiting</span>
  <span><b>${format.count(running.length)}</b> training</span>${typeof data.workers === "number" && html`<span><b>${format.count(data.workers)}</b> ${data.workers === 1 ? "worker" : "workers"}</span>`}</p>`;

const Rules = () => html`<p class="lead">The project with the lowest recent usage relative to its weight is next. Within a project, urgent jobs go before normal jobs, and normal
  before batch. Between projects, a higher priority is only a limited advantage. Jobs of one project and priority are ordered by deadline, or as moved by a user.
  Jobs whose base model is already loaded are preferred for a short time.</p>`;

function WaitingTable({ jobs }) {
  return html`<table class="table cards queue" role="table"><caption class="unseen">Waiting jobs in the order in which they will train</caption>
    <thead role="rowgroup"><tr role="row">${["Position", "Job", "State", "Why", "Submitted"].map((name) => html`<th role="columnheader" scope="col" key=${name}>${name}</th>`)}</tr></thead>
    <tbody role="rowgroup">${jobs.map((job) => html`<tr role="row" key=${job.id}>
      <td role="cell" class="place">${job.position ?? format.UNKNOWN}</td>
      <th role="rowheader" scope="row"><a href=${link.job(job.id)}>${job.suffix || job.id}</a><span class="sub"><span>${job.model}</span><span>${job.priority}</span></span></th>
      <td role="cell" class="state-cell"><${State} job=${job} /></td><td role="cell" class="why-cell"><${Place} job=${job} entry=${{}} /></td>
      <td role="cell" class="since"><span class="narrow-only">submitted </span><${Ago} at=${job.created_at} /></td></tr>`)}</tbody></table>`;
}

function Training({ jobs }) {
  if (!jobs.length) return null;
  const trainers = Map.groupBy(jobs, (job) => job.trainer_id || job.id);
  return html`<section class="beds after" aria-labelledby="training"><h2 id="training">Training now</h2>
    ${[...trainers].map(([id, aboard]) => html`<${PackedJobs} key=${id} base=${aboard[0].model} jobs=${aboard} />`)}</section>`;
}
