// An adapter's lineage record, readable and as it is: the raw record is what the lineage id is the digest of.
import { html } from "../html.js";
import { Copy, Failure, Id, Panel } from "../parts/basics.js";
import * as format from "../format.js";

const FLAT_LENGTH = 16;

export function Lineage({ record, error, adapter }) {
  const content = record?.lineage;
  return html`<${Panel} title="Lineage" id="lineage" aside=${html`<${Id} id=${adapter.lineage_id} what="lineage id" length=${16} />`}>
    ${error && html`<${Failure} error=${error} />`}
    ${content && html`<div class="lineage">${Object.entries(content).map(([name, value]) => html`<${Chapter} key=${name} name=${name} value=${value} />`)}</div>
      <details class="raw"><summary>The record as JSON</summary>
        <div class="raw-tools"><${Copy} text=${JSON.stringify(content, null, 2)} what="record" /></div>
        <pre tabindex="0">${JSON.stringify(content, null, 2)}</pre></details>`}
  <//>`;
}

const words = (key) => key.replace(/^num_/, "").replaceAll("_", " ").replace(/^lora$/, "LoRA");

function Chapter({ name, value }) {
  if (value === null || typeof value !== "object") return html`<dl class="facts chapter"><div><dt>${words(name)}</dt><dd>${leaf(value, name)}</dd></div></dl>`;
  return html`<section class="chapter"><h3>${words(name)}</h3><${Branch} value=${value} /></section>`;
}

/** Nested records, indented; a list of plain values stays on one line. */
function Branch({ value }) {
  if (Array.isArray(value)) {
    if (value.every((one) => one === null || typeof one !== "object")) return html`<span>${value.length ? value.map(String).join(", ") : "none"}</span>`;
    return html`<ol class="branches">${value.map((one, index) => html`<li key=${index}><${Branch} value=${one} /></li>`)}</ol>`;
  }
  if (value === null || typeof value !== "object") return leaf(value);
  return html`<dl class="facts">${Object.entries(value).map(([name, inner]) => html`<div key=${name} class=${inner !== null && typeof inner === "object" && !isPlainList(inner) ? "nested" : ""}>
    <dt>${words(name)}</dt><dd>${inner !== null && typeof inner === "object" ? html`<${Branch} value=${inner} />` : leaf(inner, name)}</dd></div>`)}</dl>`;
}

const isPlainList = (value) => Array.isArray(value) && value.every((one) => one === null || typeof one !== "object");

function leaf(value, name = "") {
  if (value === null) return html`<span class="soft">none</span>`;
  if (typeof value === "number" && name.endsWith("_at")) return format.absolute(value);
  if (typeof value === "number") return Number.isInteger(value) ? format.count(value) : format.power(value);
  if (typeof value === "boolean") return value ? "yes" : "no";
  return /^(sha256:)?[0-9a-f]{32,}$/.test(value) ? html`<code title=${value}>${format.short(value, FLAT_LENGTH)}</code>` : value;
}
