// Details of a job: the requested and the resolved configuration, the data report, and all attempts.
import { html } from "../html.js";
import { link } from "../router.js";
import { Ago, Facts, Panel } from "../parts/basics.js";
import { useResource } from "../resource.js";
import { groups } from "./job_settings.js";
import * as format from "../format.js";

export function Configuration({ job, rows }) {
  return html`<${Panel} title="Configuration" id="configuration">
    <div class="settings">${groups(job, rows).map(([name, settings]) => html`<table class="table table-tight config" key=${name}><caption>${name}</caption>
      <thead><tr><th scope="col"><span class="unseen">Setting</span></th><th scope="col">Requested</th><th scope="col">Resolved</th></tr></thead>
      <tbody>${settings.map(({ label, asked, resolved }) => html`<tr key=${label}><th scope="row">${label}</th>
        <td class=${asked ? "" : "soft"}>${asked ?? "default"}</td><td>${resolved}</td></tr>`)}</tbody></table>`)}</div>
    <${Facts} rows=${[
      ["Training file", html`<${FileName} id=${job.training_file} />`],
      ["Validation file", job.validation_file ? html`<${FileName} id=${job.validation_file} />` : "none"],
      ...(job.reproduces ? [["Reproduces", html`<a href=${link.adapter(job.reproduces.name)}>${job.reproduces.name}</a>`], ["Comparison", job.reproduces.message || "after the job has succeeded"]] : []),
      ...Object.entries(job.metadata || {}),
    ]} />
  <//>`;
}

/** The name and id of a file; a deleted file has only its id. */
function FileName({ id }) {
  const { data } = useResource(`/v1/files/${encodeURIComponent(id)}`);
  return data ? html`${data.filename} <span class="soft">${format.plural(data.rows, "row")}, ${format.bytes(data.bytes)}</span> <code class="soft">${id}</code>` : html`<code>${id}</code>`;
}

const REPORT = [
  ["rows", "Rows"], ["usable_rows", "Usable rows"], ["tokens", "Tokens"], ["supervised_tokens", "Trained tokens"],
  ["longest_row", "Tokens in the longest row"], ["median_row", "Tokens in the median row"], ["max_length", "Maximum length"],
  ["truncated_rows", "Truncated rows"], ["empty_rows", "Rows without trained tokens"], ["duplicate_rows", "Duplicate rows, kept"],
];

export function DataReport({ report, job }) {
  const parts = [["Training", report?.training], ["Validation", report?.validation]].filter(([, part]) => part);
  return html`<${Panel} title="Data" id="data">
    ${parts.length === 0 ? html`<p class="soft pad">${job.status === "validating_files" ? "The files are being tokenized." : "No report is available for these files."}</p>` : html`
    <table class="table table-tight"><caption class="unseen">Contents of the files, counted with the base model's tokenizer</caption>
      <thead><tr><td></td>${parts.map(([name]) => html`<th scope="col" class="num" key=${name}>${name}</th>`)}</tr></thead>
      <tbody>${REPORT.filter(([key]) => parts.some(([, part]) => typeof part[key] === "number")).map(([key, label]) => html`<tr key=${key}><th scope="row">${label}</th>
        ${parts.map(([name, part]) => html`<td class="num" key=${name}>${format.count(part[key])}</td>`)}</tr>`)}</tbody></table>`}
  <//>`;
}

const ATTEMPT = [["No.", "num"], ["State"], ["Started"], ["Duration"], ["From step", "num"], ["Trainer"], ["Shared trainer with"]];

/** The name of a column, repeated where a narrow window shows the row as a card. */
const Label = ({ text }) => html`<span class="narrow-only soft">${text} </span>`;

export function Attempts({ attempts, names }) {
  if (!attempts.length) return null;
  return html`<${Panel} title="Attempts" id="attempts">
    <div class="scroll" tabindex="0" role="region" aria-label="Attempts"><table class="table table-tight cards attempts" role="table"><caption class="unseen">Attempts, newest first</caption>
      <thead role="rowgroup"><tr role="row">${ATTEMPT.map(([name, kind]) => html`<th role="columnheader" scope="col" class=${kind} key=${name}>${name}</th>`)}</tr></thead>
      <tbody role="rowgroup">${[...attempts].sort((a, b) => b.number - a.number).map((one) => html`<tr role="row" key=${one.claim_id}>
        <th role="rowheader" scope="row" class="num"><${Label} text="Attempt" />${one.number}</th>
        <td role="cell" title=${one.detail}><${Label} text="State" />${one.ended_at ? (one.reason || "ended").replaceAll("_", " ") : html`<b>running</b>`}</td>
        <td role="cell"><${Label} text="Started" /><${Ago} at=${one.started_at} /></td>
        <td role="cell"><${Label} text="Duration" />${one.ended_at ? format.duration(one.ended_at - one.started_at) : format.UNKNOWN}</td>
        <td role="cell" class="num"><${Label} text="From step" />${format.count(one.resumed_from_step ?? 0)}</td>
        <td role="cell"><${Label} text="Trainer" /><code title=${one.trainer_id}>${format.short(one.trainer_id, 14)}</code></td>
        <td role="cell" class="mates-cell"><${Label} text="Shared trainer with" /><${Packmates} ids=${one.packmates} names=${names} /></td></tr>`)}</tbody>
    </table></div>
  <//>`;
}

function Packmates({ ids, names }) {
  if (!ids.length) return html`<span class="soft">no other job</span>`;
  return html`<span class="mates">${ids.map((id) => html`<a key=${id} href=${link.job(id)} title=${id}>${names[id] || format.short(id, 14)}</a>`)}</span>`;
}
