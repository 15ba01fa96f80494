// A trainer drawn as what it is: a bed with one block per adapter aboard, each filled as far as it has come.
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
        <span class="soft">${format.plural(jobs.length, "adapter")} aboard${room ? ` of ${room}` : ""}${speed ? ` · ${format.rate(speed)} together` : ""}</span>
      </div>
      <ul class="load">${jobs.map((job) => html`<${Block} key=${job.id} job=${job} />`)}</ul>
    </div>`;
}

function Block({ job }) {
  const part = done(job);
  const left = job.progress?.seconds_left;
  const heldOut = job.progress?.valid_loss;
  return html`
    <li class="block">
      <progress class="block-fill" max="1" value=${part ?? 0} aria-hidden="true"></progress>
      <a href=${link.job(job.id)}>${jobName(job)}</a>
      <span class="block-facts"><span>${part === null ? "starting" : format.percent(part)}</span>
        <span>${heldOut ? "held-out" : "train"} ${format.loss(heldOut ?? job.progress?.loss)}</span>
        <span>${typeof left === "number" ? `${format.duration(left)} left` : ""}</span></span>
    </li>`;
}
