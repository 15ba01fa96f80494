// The page of a job: progress, actions, curves, events, attempts, data and configuration.
import { html, useEffect } from "../html.js";
import { link } from "../router.js";
import { useJob } from "../job_data.js";
import { Ago, FINAL, Failure, Id, Loading, Panel, State, Until, stateWord } from "../parts/basics.js";
import { Bar, TOOK, done, epochs, jobName, numSteps, passes } from "../parts/progress.js";
import { useWhy } from "../parts/waiting.js";
import { Actions } from "./job_actions.js";
import { Curves } from "./job_curves.js";
import { Events } from "./job_events.js";
import { Attempts, Configuration, DataReport } from "./job_details.js";
import { Placement } from "./job_placement.js";
import * as format from "../format.js";

export function JobPage({ id }) {
  const held = useJob(id);
  const { job, error } = held;
  const why = useWhy(job);
  const name = job && jobName(job);
  const rows = held.report?.training?.usable_rows;
  useEffect(() => { if (name) document.title = `${name} · Lorry`; }, [name]);
  if (!job) return html`<div class="title"><h1 tabindex="-1">Job</h1></div>${error ? html`<${Failure} error=${error} retry=${held.reload} />` : html`<${Loading} />`}`;
  return html`
    <nav class="trail" aria-label="Breadcrumb"><a href=${link.jobs()}>Jobs</a></nav>
    <div class="title">
      <h1 tabindex="-1">${jobName(job)}</h1><${State} job=${job} />
      <${Actions} job=${job} done=${held.reload} />
    </div>
    <p class="under"><${Id} id=${job.id} what="job id" /><span>${job.model}</span>
      ${job.priority && job.priority !== "normal" && html`<span>priority ${job.priority}</span>`}
      <span>created <${Ago} at=${job.created_at} /></span></p>
    ${error && html`<${Failure} error=${error} retry=${held.reload} />`}
    <${Outcome} job=${job} why=${why} />
    ${hasBegun(held) ? html`<${Headline} job=${job} valid=${held.valid} train=${held.train} rows=${rows} />
      <div class="columns">
        <div class="column"><${Curves} train=${held.train} valid=${held.valid} job=${job} /><${Attempts} attempts=${held.attempts} names=${held.names} /></div>
        <div class="column"><${Events} job=${job} events=${held.events} older=${held.older} showMetrics=${held.showMetrics} /><${Placement} job=${job} why=${why} /><${DataReport} report=${held.report} job=${job} /></div>
      </div>` : html`
      <div class="columns">
        <div class="column"><${Events} job=${job} events=${held.events} older=${held.older} showMetrics=${held.showMetrics} /><${Attempts} attempts=${held.attempts} names=${held.names} /></div>
        <div class="column"><${Placement} job=${job} why=${why} /><${DataReport} report=${held.report} job=${job} /></div>
      </div>`}
    <${Configuration} job=${job} rows=${rows} />`;
}

/** Whether to show figures and curves. Before the first step a job has none, and the page starts with its events. */
const hasBegun = ({ job, train, valid }) => job.status === "running" || train.length + valid.length > 0;

/** The most important fact about a job that is not running: its error, or why it waits. */
function Outcome({ job, why }) {
  if (job.status === "failed") {
    const error = job.error || { message: "No reason was recorded." };
    return html`<div class="failure"><p><strong>${error.message}</strong></p>${error.remedy && html`<p>${error.remedy}</p>`}
      ${error.code && html`<p class="soft">code <code>${error.code}</code>${error.param && html`, at <code>${error.param}</code>`}</p>`}</div>`;
  }
  if (job.status === "queued" || job.status === "validating_files") {
    return html`<div class="notice"><p><strong>${job.status === "queued" ? "Waiting to train." : "Tokenizing files."}</strong> ${why?.explanation || "…"}</p></div>`;
  }
  if (job.status === "paused") return html`<div class="notice"><p><strong>Paused.</strong> After a resume, the job continues where it stopped.</p></div>`;
  return null;
}

function Headline({ job, train, valid, rows }) {
  const progress = job.progress || {};
  const turns = progress.step ? epochs(job, rows) : null;
  const part = done(job);
  return html`<section class="headline" aria-label="Progress">
    <div class="headline-bar"><${Bar} job=${job} /><p><b>${part === null ? stateWord(job.status) : format.percent(part)}</b>
      ${numSteps(job) > 0 && html`<span>step ${format.count(progress.step ?? 0)} of ${format.count(numSteps(job))}</span>`}
      ${turns && html`<span>epoch ${turns.done.toFixed(2)} of ${passes(turns.total)}</span>`}</p></div>
    <dl class="figures">
      ${FINAL.has(job.status)
        ? html`<${Figure} name="Finished" value=${html`<${Ago} at=${job.finished_at} />`} note=${job.seconds_running > 0 ? html`<span title=${TOOK}>took ${format.duration(job.seconds_running)}</span>` : null} />`
        : html`<${Figure} name="Time left" value=${html`<${Until} seconds=${job.status === "running" ? progress.seconds_left : undefined} before="done at" />`} />`}
      <${Figure} name="Train loss" value=${format.loss(progress.loss ?? train.at(-1)?.loss)} note=${train.length > 1 ? `from ${format.loss(train[0].loss)}` : null} />
      <${Figure} name="Validation loss" value=${format.loss(progress.kept_valid_loss ?? valid.at(-1)?.loss)} note=${validationNote(job, valid)} />
      ${FINAL.has(job.status)
        ? job.trained_tokens > 0 && html`<${Figure} name="Trained on" value=${format.compact(job.trained_tokens)} note="tokens" />`
        : job.status === "running" && html`<${Figure} name="Speed" value=${format.count(progress.tokens_per_second)} note="tokens per second" />`}
    </dl>
    ${job.adapter_id && html`<p class="headline-adapter"><a class="button primary" href=${link.adapter(job.adapter_id)}>View adapter</a></p>`}
  </section>`;
}

function validationNote(job, valid) {
  if (!job.validation_file) return "no validation file";
  const { step, kept_step: kept, kept_valid_loss: loss } = job.progress || {};
  if (typeof loss === "number" && kept !== step) return `best at step ${format.count(kept)}, used for the adapter; latest: ${format.loss(valid.at(-1)?.loss)}`;
  if (valid.length > 1) return `${format.change(valid[0].loss, valid.at(-1).loss)} since the start`;
  return valid.length ? "of the base model" : "not evaluated yet";
}

const Figure = ({ name, value, note }) => html`<div><dt>${name}</dt><dd><b>${value}</b>${note && html`<span class="soft">${note}</span>`}</dd></div>`;
