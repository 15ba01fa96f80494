// Facts that the list of adapters and an adapter's page share: the name, the change of the loss, the verification.
import { html } from "../html.js";
import * as format from "../format.js";

/** The suffix of a name of the form ft:BASE:PROJECT:SUFFIX:ID, else the name. */
export function adapterLabel(adapter) {
  const parts = adapter.name.split(":");
  return (parts.length >= 5 && parts[3]) || adapter.name;
}

export const archivePath = (adapter) => `/v1/adapters/${encodeURIComponent(adapter.id)}/archive`;

/** Where the adapter's job started, the base model or a parent adapter, with its validation loss and perplexity. */
export function before({ base_loss, base_perplexity, parent_loss, parent_perplexity }) {
  const isChild = typeof parent_loss === "number";
  return { name: isChild ? "parent" : "base", loss: isChild ? parent_loss : base_loss, perplexity: isChild ? parent_perplexity : base_perplexity };
}

/** Validation loss of the base model or of the parent adapter, and of the adapter. */
export function Gain({ evaluation }) {
  if (!evaluation) return html`<span class="soft">not evaluated</span>`;
  const { loss } = evaluation;
  const first = before(evaluation).loss;
  return html`<span class="gain"><span class="soft">${format.loss(first)}</span> <span aria-hidden="true">→</span><span class="unseen">to</span> <b>${format.loss(loss)}</b>
    <span class=${`sub ${loss < first ? "good-text" : "bad-text"}`}>${format.change(first, loss)}</span></span>`;
}

/** Whether the logits of PEFT match those of training, and their largest difference. */
export function Verified({ verification }) {
  if (!verification) return html`<span class="soft">not verified</span>`;
  return html`<span class=${verification.passed === false ? "bad-text" : "good-text"}>${verification.passed === false ? "failed" : "passed"}</span>
    <span class="sub"><span title="Largest difference between the logits of PEFT and of training">max Δ ${format.power(verification.max_abs_diff)}</span></span>`;
}
