// Who trains next and why: the scheduler's own order, in its own words.
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
        <${Empty} title="Nothing waits." command="lorry jobs submit MODEL train.jsonl">A job submitted now starts as soon as a worker has room for it.<//>`}
      <${Training} jobs=${running} />`}`;
}

/** An entry of the queue, with the names that a job has elsewhere. */
const asJob = (entry) => ({ ...entry, id: entry.job_id, status: entry.state, model: entry.base_model });

const Tally = ({ data, waiting, running }) => html`<p class="tally"><span><b>${format.count(waiting.length)}</b> waiting</span>
  <span><b>${format.count(running.length)}</b> training</span>${typeof data.workers === "number" && html`<span><b>${format.count(data.workers)}</b> ${data.workers === 1 ? "worker" : "workers"}</span>`}</p>`;

const Rules = () => html`<p class="lead">Projects take turns by what they have used for their weight. Within a project, urgent goes before normal, and normal before batch;
  between projects, a class gives a limited head start. Of equals, the oldest job goes first.
  A base model that a worker already holds is preferred for a short while, so that nobody waits long for it.</p>`;

function WaitingTable({ jobs }) {
  return html`<table class="table cards queue" role="table"><caption class="unseen">Waiting jobs in the order in which they will train</caption>
    <thead role="rowgroup"><tr role="row">${["Turn", "Job", "State", "Why", "Waiting since"].map((name) => html`<th role="columnheader" scope="col" key=${name}>${name}</th>`)}</tr></thead>
    <tbody role="rowgroup">${jobs.map((job) => html`<tr role="row" key=${job.id}>
      <td role="cell" class="place">${job.position ?? format.UNKNOWN}</td>
      <th role="rowheader" scope="row"><a href=${link.job(job.id)}>${job.suffix || job.id}</a><span class="sub"><span>${job.model}</span><span>${job.priority}</span></span></th>
      <td role="cell" class="state-cell"><${State} job=${job} /></td><td role="cell" class="why-cell"><${Place} job=${job} entry=${{}} /></td>
      <td role="cell" class="since"><span class="narrow-only">waiting since </span><${Ago} at=${job.created_at} /></td></tr>`)}</tbody></table>`;
}

function Training({ jobs }) {
  if (!jobs.length) return null;
  const trainers = Map.groupBy(jobs, (job) => job.trainer_id || job.id);
  return html`<section class="beds after" aria-labelledby="training"><h2 id="training">Training now</h2>
    ${[...trainers].map(([id, aboard]) => html`<${PackedJobs} key=${id} base=${aboard[0].model} jobs=${aboard} />`)}</section>`;
}
