// What a job was asked for and what that came to, what its data holds, and every attempt with who rode along.
import { html } from "../html.js";
import { link } from "../router.js";
import { Ago, Facts, Panel } from "../parts/basics.js";
import * as format from "../format.js";

const text = (value) => (Array.isArray(value) ? value.join(", ") : typeof value === "number" ? format.power(value) : value === null ? "none" : value === true ? "yes" : value === false ? "no" : String(value));

/** [name, asked for, resolved] of every setting. What was not asked for is `auto`. */
function settings(job) {
  const asked = job.requested || {};
  const numbers = asked.method?.supervised?.hyperparameters || asked.hyperparameters || {};
  const given = (value) => (value === undefined || value === null ? null : value);
  const group = (name, requested) => Object.entries(job[name] || {}).map(([key, value]) => [`${LABELS[key] || key.replaceAll("_", " ")}`, given(requested?.[key]), value]);
  const resolved = job.hyperparameters || {};
  return [
    ["LoRA", group("lora", asked.lora)],
    ["Optimizer", group("optimizer", asked.optimizer)],
    ["Schedule", group("schedule", asked.schedule)],
    ["Run", [
      ["batch size", given(numbers.batch_size), resolved.batch_size], ["epochs", given(numbers.n_epochs), resolved.n_epochs],
      ["rate multiplier", given(numbers.learning_rate_multiplier), resolved.learning_rate_multiplier],
      ["max length", given(asked.max_length), job.max_length], ["max steps", given(asked.max_steps), job.max_steps],
      ["evaluate every", given(asked.evaluation?.every_steps), job.evaluation?.every_steps],
      ["checkpoint every", given(asked.checkpoint_every_steps), job.checkpoint_every_steps],
      ["precision", given(asked.precision), job.precision], ["seed", given(asked.seed), job.seed], ["priority", given(asked.priority), job.priority],
    ].filter(([, , value]) => value !== undefined)],
  ].filter(([, rows]) => rows.length);
}

const LABELS = { target_modules: "targets", use_rslora: "rank-stabilised", max_grad_norm: "clip at norm", type: "shape", warmup_ratio: "warm-up part", eps: "epsilon" };

export function Configuration({ job }) {
  return html`<${Panel} title="Configuration" id="configuration">
    <table class="table table-tight config"><caption class="unseen">Settings, as asked for and as resolved</caption>
      <thead><tr><th scope="col">Setting</th><th scope="col">Asked for</th><th scope="col">Resolved</th></tr></thead>
      ${settings(job).map(([name, rows]) => html`<tbody key=${name}><tr class="group"><th colspan="3" scope="colgroup">${name}</th></tr>
        ${rows.map(([label, asked, resolved]) => html`<tr key=${label}><th scope="row">${label}</th>
          <td class=${asked === null || asked === "auto" ? "soft" : ""}>${asked === null ? "default" : text(asked)}</td><td>${text(resolved)}</td></tr>`)}</tbody>`)}
    </table>
    <${Facts} rows=${[
      ["Training file", html`<code>${job.training_file}</code>`],
      ["Held-out file", job.validation_file ? html`<code>${job.validation_file}</code>` : "none"],
      ...Object.entries(job.metadata || {}).map(([key, value]) => [key, value]),
    ]} />
  <//>`;
}

const REPORT = [
  ["rows", "Rows"], ["tokens", "Tokens"], ["supervised_tokens", "Supervised tokens"], ["truncated_rows", "Rows cut to length"],
  ["empty_rows", "Rows with nothing to learn"], ["duplicate_rows", "Duplicate rows"], ["longest_row", "Longest row"],
];

export function DataReport({ report, job }) {
  const parts = [["Training", report?.training], ["Held-out", report?.validation]].filter(([, part]) => part);
  return html`<${Panel} title="Data" id="data">
    ${parts.length === 0 ? html`<p class="soft pad">${job.status === "validating_files" ? "The files are being read." : "No report was kept for these files."}</p>` : html`
    <table class="table table-tight"><caption class="unseen">What the files hold, as counted by the base model's tokenizer</caption>
      <thead><tr><th scope="col"><span class="unseen">Count</span></th>${parts.map(([name]) => html`<th scope="col" class="num" key=${name}>${name}</th>`)}</tr></thead>
      <tbody>${reportRows(parts).map(([key, label]) => html`<tr key=${key}><th scope="row">${label}</th>
        ${parts.map(([name, part]) => html`<td class="num" key=${name}>${format.count(part[key])}</td>`)}</tr>`)}</tbody></table>`}
  <//>`;
}

function reportRows(parts) {
  const numbers = new Set(parts.flatMap(([, part]) => Object.keys(part).filter((key) => typeof part[key] === "number")));
  const named = REPORT.filter(([key]) => numbers.delete(key));
  return [...named, ...[...numbers].map((key) => [key, sentenceCase(key)])];
}

const sentenceCase = (key) => { const words = key.replace(/^num_/, "").replaceAll("_", " "); return words[0].toUpperCase() + words.slice(1); };

export function Attempts({ attempts, job }) {
  if (!attempts.length) return null;
  return html`<${Panel} title="Attempts" id="attempts">
    <div class="scroll" tabindex="0" role="region" aria-label="Attempts"><table class="table table-tight"><caption class="unseen">Every attempt, the last one first</caption>
      <thead><tr><th scope="col" class="num">No.</th><th scope="col">Ended</th><th scope="col">Started</th><th scope="col">Took</th><th scope="col">From step</th><th scope="col">Trainer</th><th scope="col">Trained together with</th></tr></thead>
      <tbody>${[...attempts].sort((a, b) => b.number - a.number).map((one) => html`<tr key=${one.claim_id || one.number}>
        <th scope="row" class="num">${one.number}</th>
        <td title=${one.detail}>${one.ended_at ? (one.reason || "ended").replaceAll("_", " ") : html`<b>running</b>`}</td>
        <td><${Ago} at=${one.started_at} /></td>
        <td>${one.ended_at ? format.duration(one.ended_at - one.started_at) : format.UNKNOWN}</td>
        <td class="num">${format.count(one.resumed_from_step ?? 0)}</td>
        <td><code title=${one.trainer_id}>${format.short(one.trainer_id, 14)}</code></td>
        <td>${packmates(one, job)}</td></tr>`)}</tbody>
    </table></div>
  <//>`;
}

function packmates(attempt, job) {
  const others = (attempt.packmates || []).map((mate) => (typeof mate === "string" ? { id: mate } : mate)).filter((mate) => mate.id !== job.id);
  if (!others.length) return html`<span class="soft">alone</span>`;
  return html`<span class="mates">${others.map((mate) => html`<a key=${mate.id} href=${link.job(mate.id)} title=${mate.id}>${mate.suffix || format.short(mate.id, 14)}</a>`)}</span>`;
}
