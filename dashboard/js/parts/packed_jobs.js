// A trainer, drawn as a truck bed with one block per adapter. Each block shows the progress of its job.
import { html } from "../html.js";
import * as format from "../format.js";
import { link } from "../router.js";
import { done, jobName } from "./progress.js";

export function PackedJobs({ base, jobs, heading = "h3", room }) {
  const speed = jobs.reduce((sum, job) => sum + (job.progress?.tokens_per_second || 0), 0);
  return html`
    <div class="bed">
      <div class="bed-head">
        <${heading} class="bed-base">${base || "no base model"}</${heading}>
        <span class="soft">${format.plural(jobs.length, "adapter")}${room ? ` of ${room}` : ""} training${speed ? ` · ${format.rate(speed)} in total` : ""}</span>
      </div>
      <ul class="load">${jobs.map((job) => html`<${Block} key=${job.id} job=${job} />`)}</ul>
    </div>`;
}

function Block({ job }) {
  const part = done(job);
  const left = job.progress?.seconds_left;
  const validLoss = job.progress?.valid_loss;
  return html`
    <li class="block">
      <progress class="block-fill" max="1" value=${part ?? 0} aria-hidden="true"></progress>
      <a href=${link.job(job.id)}>${jobName(job)}</a>
      <span class="block-facts"><span>${part === null ? "starting" : format.percent(part)}</span>
        <span>${validLoss ? "validation" : "train"} ${format.loss(validLoss ?? job.progress?.loss)}</span>
        <span>${typeof left === "number" ? `${format.duration(left)} left` : ""}</span></span>
    </li>`;
}
