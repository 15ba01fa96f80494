// What the list and the page of adapters both say: the name, the gain over the base, the verification.
import { html } from "../html.js";
import * as format from "../format.js";

/** ft:BASE:PROJECT:SUFFIX:ID is long: people call it by its suffix. */
export function adapterLabel(adapter) {
  const parts = adapter.name.split(":");
  return (parts.length >= 5 && parts[3]) || adapter.name;
}

export const archivePath = (adapter) => `/v1/adapters/${encodeURIComponent(adapter.id)}/archive`;

/** What the job of an adapter began with, and its held-out loss and perplexity. */
export function before({ base_loss, base_perplexity, parent_loss, parent_perplexity }) {
  const isChild = typeof parent_loss === "number";
  return { name: isChild ? "parent" : "base", loss: isChild ? parent_loss : base_loss, perplexity: isChild ? parent_perplexity : base_perplexity };
}

/** Held-out loss of the base, or of the parent adapter, and of the adapter. */
export function Gain({ evaluation }) {
  if (!evaluation) return html`<span class="soft">not evaluated</span>`;
  const { loss } = evaluation;
  const first = before(evaluation).loss;
  return html`<span class="gain"><span class="soft">${format.loss(first)}</span> <span aria-hidden="true">→</span><span class="unseen">to</span> <b>${format.loss(loss)}</b>
    <span class=${`sub ${loss < first ? "good-text" : "bad-text"}`}>${format.change(first, loss)}</span></span>`;
}

/** Whether PEFT gave the logits that training saw, and how far off it was at most. */
export function Verified({ verification }) {
  if (!verification) return html`<span class="soft">not verified</span>`;
  return html`<span class=${verification.passed === false ? "bad-text" : "good-text"}>${verification.passed === false ? "failed" : "passed"}</span>
    <span class="sub"><span title="Largest difference of a logit between PEFT and training">max Δ ${format.power(verification.max_abs_diff)}</span></span>`;
}
