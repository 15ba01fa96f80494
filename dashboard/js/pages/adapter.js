// The page of an adapter: download, evaluation, verification, exports, files and lineage.
import { html, useState } from "../html.js";
import { send } from "../api.js";
import { link } from "../router.js";
import { useResource } from "../resource.js";
import { announce } from "../parts/announce.js";
import { Ago, Command, Copy, Facts, Failure, Id, Loading, Panel } from "../parts/basics.js";
import { adapterLabel, archivePath, before } from "../parts/adapter_facts.js";
import { TryIt } from "../parts/try_it.js";
import { Deployments } from "../parts/deployments.js";
import { Exports } from "./adapter_exports.js";
import { Lineage } from "./adapter_lineage.js";
import * as format from "../format.js";

export function AdapterPage({ id }) {
  const path = `/v1/adapters/${encodeURIComponent(id)}`;
  const { data: adapter, error, reload } = useResource(path);
  const files = useResource(`${path}/files`);
  const lineage = useResource(`${path}/lineage`);
  if (!adapter) return html`<div class="title"><h1 tabindex="-1">Adapter</h1></div>${error ? html`<${Failure} error=${error} retry=${reload} />` : html`<${Loading} />`}`;
  return html`
    <nav class="trail" aria-label="Breadcrumb"><a href=${link.adapters()}>Adapters</a></nav>
    <div class="title"><h1 tabindex="-1">${adapterLabel(adapter)}</h1>
      <div class="buttons actions"><a class="button primary" href=${archivePath(adapter)} download>Download<span class="button-note">.tar, ${format.bytes(adapter.bytes)}</span></a></div></div>
    <p class="under"><${Id} id=${adapter.name} what="adapter name" /><span>created <${Ago} at=${adapter.created_at} /></span>
      <span>by job <a href=${link.job(adapter.job_id)}>${format.short(adapter.job_id, 18)}</a></span></p>
    <div class="columns">
      <div class="column"><${TryIt} adapter=${adapter} /><${Evaluation} evaluation=${adapter.evaluation} /><${Efficiency} efficiency=${adapter.efficiency} /><${Verification} adapter=${adapter} path=${path} /><${Deployments} adapter=${adapter} path=${path} /><${Files} files=${files} path=${path} /></div>
      <div class="column"><${Panel} title="Details" id="what"><${Facts} rows=${[
          ["Base model", adapter.base_model], ["Continues", adapter.parent && html`<a href=${link.adapter(adapter.parent)}>${adapter.parent}</a>`], ["Rank", adapter.rank], ["Base model precision", basePrecision(adapter)], ["Trained parameters", format.count(adapter.num_parameters)],
          ["Size", format.bytes(adapter.bytes)], ["Base digest", html`<${Id} id=${adapter.base_digest} what="base digest" length=${16} />`],
          ["Artifact", html`<${Id} id=${adapter.artifact} what="artifact digest" length=${16} />`],
        ]} /><p class="pad soft">Download it in a terminal:</p><${Command} text=${`lorry adapters pull ${adapter.id}`} /><//><${Exports} adapter=${adapter} path=${path} /></div>
    </div>
    <${Lineage} record=${lineage.data} error=${lineage.error} adapter=${adapter} />`;
}

/** The precision of the base model's weights in training and verification. */
const basePrecision = ({ precision, quantization }) => (quantization === "none" ? precision : [quantization, precision].filter(Boolean).join(" with "));

function Evaluation({ evaluation }) {
  if (!evaluation) return html`<${Panel} title="Comparison with base model" id="evaluation"><p class="soft pad">The job had no validation file, so the adapter was not evaluated. Pass one with <code>--valid</code>.</p><//>`;
  const { loss, perplexity, rewards } = evaluation;
  const first = before(evaluation);
  const origin = first.name === "base" ? "base model" : "parent adapter";
  const row = (name, value, kind) => html`<tr key=${name}><th scope="row">${name}</th>
    <td class="meter-cell"><progress class=${`bar meter-${kind}`} max=${Math.max(first.loss, loss)} value=${value} aria-hidden="true"></progress></td>
    <td class="num"><b>${format.loss(value)}</b></td>${rewards ? null : html`<td class="num">${format.power(kind === "base" ? first.perplexity : perplexity)}</td>`}</tr>`;
  return html`<${Panel} title=${`Comparison with ${origin}`} id="evaluation" aside=${html`<span class=${loss < first.loss ? "good-text" : "bad-text"}>${format.change(first.loss, loss)} loss</span>`}>
    <table class="table table-tight compare"><caption class="unseen">Validation loss of the ${origin} and of the adapter</caption>
      <thead><tr><th scope="col">Validation data</th><td></td><th scope="col" class="num">Loss</th>${rewards ? null : html`<th scope="col" class="num">Perplexity</th>`}</tr></thead>
      <tbody>${row(origin, first.loss, "base")}${row("this adapter", loss, "adapter")}</tbody></table>
    ${rewards ? html`<p class="pad soft">${Number.isFinite(rewards.kl) ? "Rewards match the labels" : "The preferred answer has the higher reward"} in ${format.percent(rewards.accuracy, 1)} of the validation ${Number.isFinite(rewards.kl) ? "answers" : "pairs"}. Average reward margin: ${format.power(rewards.margin)}.</p>` : null}
  <//>`;
}

const COMPONENTS = [["weights", "weights"], ["gradients", "gradients"], ["optimizer_state", "optimizer state"], ["activations", "activations"]];

/** The comparison with full fine-tuning: parameters, size, training memory by component, and latency. */
function Efficiency({ efficiency }) {
  if (!efficiency) return null;
  const { parameters, size, training_memory: memory, inference_latency: latency } = efficiency;
  const row = (name, lora, full, share) => html`<tr key=${name}><th scope="row">${name}</th><td class="num">${lora}</td><td class="num">${full}</td><td class="num">${share === undefined ? "" : format.share(share)}</td></tr>`;
  return html`<${Panel} title="Compared with full fine-tuning" id="efficiency">
    <table class="table table-tight efficiency"><caption class="unseen">The adapter compared with full fine-tuning of the base model</caption>
      <thead><tr><th scope="col">Quantity</th><th scope="col" class="num">LoRA</th><th scope="col" class="num">Full</th><th scope="col" class="num">Share</th></tr></thead>
      <tbody>${row("Trained parameters", format.compact(parameters.trainable), format.compact(parameters.base), parameters.share)}
        ${row("Weights file", format.bytes(size.bytes), format.bytes(size.base_bytes), size.share)}
        ${memory && row("Training memory", format.bytes(memory.lora.total), format.bytes(memory.full_fine_tuning.total), memory.share)}
        ${memory && COMPONENTS.map(([key, name]) => row(`Memory: ${name}`, format.bytes(memory.lora[key]), format.bytes(memory.full_fine_tuning[key])))}
        ${latency && row("Time of a merged pass", format.seconds(latency.merged_seconds), format.seconds(latency.base_seconds), latency.ratio)}</tbody></table>
    <p class="pad soft">${memory ? "Training memory is computed: AdamW in the same precision." : ""}${memory?.measured ? ` Measured peak of the trainer: ${format.bytes(memory.measured.peak_bytes)}.` : ""}${latency ? " The latency was measured at the last export." : " Latency: not measured yet."}</p>
  <//>`;
}

function Verification({ adapter, path }) {
  const [state, setState] = useState({ busy: false, result: null, error: null });
  const verify = async () => {
    setState({ busy: true, result: null, error: null });
    try {
      const result = await send("POST", `${path}/verify`);
      setState({ busy: false, result, error: null });
      announce(result.passed ? "Verified: no problems found" : `Verification found ${format.plural(result.problems.length, "problem")}`);
    } catch (error) {
      setState({ busy: false, result: null, error });
    }
  };
  const facts = adapter.verification || {};
  const button = html`<button type="button" onClick=${verify} disabled=${state.busy}>${state.busy ? "Verifying…" : "Verify now"}</button>`;
  return html`<${Panel} title="Verification" id="verification" aside=${button}>
    <p class="pad">${adapter.verification
      ? html`Loaded by PEFT on the base model, its logits differ from those of training by at most <b>${format.power(facts.max_abs_diff)}</b>${typeof facts.tolerance === "number" && html` (allowed: ${format.power(facts.tolerance)})`}.${facts.explanation && html` ${facts.explanation}`}`
      : "No verification is recorded."}</p>
    ${state.result && html`<div class=${`result ${state.result.passed ? "result-good" : "result-bad"}`}>
      <p><b>${state.result.passed ? "All files match the manifest, and the lineage record matches its id." : "The adapter does not match its records."}</b></p>
      ${state.result.problems?.length > 0 && html`<ul>${state.result.problems.map((problem) => html`<li key=${problem}>${problem}</li>`)}</ul>`}</div>`}
    ${state.error && html`<${Failure} error=${state.error} />`}
  <//>`;
}

function Files({ files, path }) {
  const rows = files.data?.data || [];
  return html`<${Panel} title="Files" id="files">
    ${files.error && html`<${Failure} error=${files.error} retry=${files.reload} />`}
    <table class="table table-tight files"><caption class="unseen">Files of the adapter</caption>
      <thead><tr><th scope="col">File</th><th scope="col" class="num">Size</th><th scope="col">sha256</th></tr></thead>
      <tbody>${rows.map((file) => html`<tr key=${file.path}><th scope="row"><a href=${`${path}/files/${file.path.split("/").map(encodeURIComponent).join("/")}`} download>${file.path}</a></th>
        <td class="num">${format.bytes(file.num_bytes)}</td><td><span class="id id-short"><code title=${file.digest}>${format.short((file.digest || "").replace("sha256:", ""), 8)}</code><${Copy} text=${file.digest || ""} what=${`digest of ${file.path}`} /></span></td></tr>`)}</tbody></table>
  <//>`;
}
