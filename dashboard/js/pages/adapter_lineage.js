// An adapter's lineage record: a summary, every section of the record, and the raw record. The lineage id is the
// digest of the raw record.
import { html } from "../html.js";
import { link } from "../router.js";
import { useResource } from "../resource.js";
import { strategyText } from "../parts/sharding.js";
import { Copy, Facts, Failure, Id, Panel } from "../parts/basics.js";
import * as format from "../format.js";

const KNOWN_FORMAT = "lorry.lineage/1";
const DIGEST_LENGTH = 16;
const INLINE_LENGTH = 60;

export function Lineage({ record, error, adapter }) {
  const content = record?.lineage;
  return html`<${Panel} title="Lineage" id="lineage" aside=${html`<${Id} id=${adapter.lineage_id} what="lineage id" length=${DIGEST_LENGTH} />`}>
    ${error && html`<${Failure} error=${error} />`}
    ${content && html`
      ${content.format === KNOWN_FORMAT && html`<${Facts} rows=${summary(content)} />`}
      <div class="chapters" role="group" aria-label="Sections of the record">${Object.entries(content).filter(([, value]) => isBranch(value)).map(([name, value]) => html`<details key=${name} class="chapter">
        <summary>${words(name)}</summary><${Branch} value=${value} /></details>`)}
        <details class="chapter raw"><summary>The record as JSON</summary>
          <div class="raw-tools"><${Copy} text=${JSON.stringify(content, null, 2)} what="record" /></div>
          <pre tabindex="0">${JSON.stringify(content, null, 2)}</pre></details></div>`}
  <//>`;
}

/** The most important facts of the record. */
function summary({ job, base, data, attempts, results, code, people }) {
  const digest = (value) => html`<code class="soft" title=${value}>${format.short(value, DIGEST_LENGTH)}</code>`;
  const last = attempts.at(-1);
  const mates = last?.num_packmates ?? last?.packmates?.length; // older records have only `packmates`
  const company = mates === undefined ? "" : mates ? `, together with ${format.plural(mates, "other job")}` : ", alone";
  return [
    ["Job", html`<a href=${link.job(job)}>${job}</a>`],
    ["Base model", html`${base.name}${base.source && `, ${base.source}`}${base.revision && ` at ${base.revision}`} ${digest(base.digest)}`],
    ["Base model license", base.license],
    ...data.map((source) => [source.role === "training" ? "Training file" : "Validation file", html`<${FileName} id=${source.file} />, ${format.plural(source.num_rows, "row")} ${digest(source.digest)}`]),
    ["Requested", html`<time datetime=${people.requested_at}>${format.absolute(Date.parse(people.requested_at) / 1000)}</time>`],
    ["Attempts", `${format.count(attempts.length)}, the last on ${last?.worker}${company}`],
    ["Base model placement", placementOf(last?.machine || {})],
    ["Result", `${format.plural(results.steps, "step")}, ${format.count(results.trained_tokens)} tokens`],
    ["Determinism", leaf(results.determinism)],
    ["Software", Object.entries(code).map(([name, version]) => `${name} ${version}`).join(", ")],
  ];
}

/** How the processes of the trainer held the base model; null for one process. */
const placementOf = ({ num_processes: number, strategy, device }) => (number > 1 && strategy ? strategyText({ strategy, number, kind: device?.startsWith("cuda") ? "cuda" : "cpu" }) : null);

/** The name and id of a file. The record has only the id; a deleted file has no name. */
function FileName({ id }) {
  const { data } = useResource(`/v1/files/${encodeURIComponent(id)}`);
  return data ? html`${data.filename} <span class="soft">${id}</span>` : id;
}

const words = (key) => key.replace(/^num_/, "").replaceAll("_", " ").replace(/^lora$/, "LoRA");

const isBranch = (value) => value !== null && typeof value === "object";

/** A nested value, indented. A short list stays on one line. */
function Branch({ value }) {
  if (!isBranch(value)) return leaf(value);
  if (isShort(value)) return html`<span class="pad-inline">${inline(value)}</span>`;
  if (Array.isArray(value)) return html`<ol class="branches">${value.map((one, index) => html`<li key=${index}><${Branch} value=${one} /></li>`)}</ol>`;
  return html`<dl class="facts">${Object.entries(value).map(([name, inner]) => html`<div key=${name} class=${isBranch(inner) && !isShort(inner) ? "nested" : ""}>
    <dt>${words(name)}</dt><dd>${isBranch(inner) && !isShort(inner) ? html`<${Branch} value=${inner} />` : isBranch(inner) ? inline(inner) : leaf(inner, name)}</dd></div>`)}</dl>`;
}

const isShort = (value) => Array.isArray(value) && JSON.stringify(value).length <= INLINE_LENGTH;

const inline = (list) => (list.length ? list.map((one) => (isBranch(one) ? JSON.stringify(one) : String(one))).join(", ") : "none");

function leaf(value, name = "") {
  if (value === null || value === undefined) return html`<span class="soft">none</span>`;
  if (typeof value === "number" && name !== "seed") return Number.isInteger(value) ? format.count(value) : format.power(value);
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (isBranch(value)) return JSON.stringify(value);
  return /^(sha256:)?[0-9a-f]{32,}$/.test(value) ? html`<code title=${value}>${format.short(value, DIGEST_LENGTH)}</code>` : String(value);
}
