// Exports of an adapter for serving engines: a form that requests one, and the project's exports with their files.
import { html, useEffect, useRef, useState } from "../html.js";
import { browserSession, send } from "../api.js";
import { useResource } from "../resource.js";
import { useStore } from "../store.js";
import { announce } from "../parts/announce.js";
import { Ago, Command, FINAL, Failure, Panel, stateWord } from "../parts/basics.js";
import { confirm } from "../parts/confirm.js";
import * as format from "../format.js";

const READ_MS = 2000;
const CHOICES = [
  ["gguf q8_0", "GGUF, 8 bits (llama.cpp, Ollama)"],
  ["gguf f16", "GGUF, 16 bits (llama.cpp, Ollama)"],
  ["gguf-lora", "GGUF LoRA file (llama.cpp)"],
  ["merged", "Merged safetensors (vLLM, Transformers)"],
];
const FOR_THE_HUB = ["adapter", "Adapter files (only for the Hugging Face Hub)"];

export function Exports({ adapter, path }) {
  const { data, error, reload } = useResource(`${path}/exports?limit=100`);
  const rows = data?.data || [];
  const isOpen = rows.some((row) => !FINAL.has(row.status));
  useEffect(() => {
    if (!isOpen) return undefined;
    const timer = setInterval(() => { if (!document.hidden) reload(); }, READ_MS);
    return () => clearInterval(timer);
  }, [isOpen, reload]);
  return html`<${Panel} title="Exports" id="exports">
    <${Form} path=${path} done=${reload} />
    ${error && html`<${Failure} error=${error} retry=${reload} />`}
    ${rows.length > 0 && html`<ul class="exports" aria-label="Exports of the adapter">${rows.map((row) => html`<li key=${row.id}><${Row} row=${row} path=${path} done=${reload} /></li>`)}</ul>`}
    <p class="pad soft">Export it in a terminal:</p><${Command} text=${`lorry adapters export ${adapter.id} --format gguf`} />
  <//>`;
}

function Form({ path, done }) {
  const choice = useRef(null);
  const repository = useRef(null);
  const hasHub = Boolean(useStore(browserSession)?.uploads_to_hub);
  const [state, setState] = useState({ busy: false, error: null });
  const submit = async (event) => {
    event.preventDefault();
    if (state.busy) return;
    const [kind, quantization] = choice.current.value.split(" ");
    const given = repository.current?.value.trim();
    setState({ busy: true, error: null });
    try {
      const made = await send("POST", `${path}/exports`, { format: kind, ...(quantization && { quantization }), ...(given && { hub_repository: given }) });
      announce(FINAL.has(made.status) ? "This export exists already" : "Export requested");
      await done();
      setState({ busy: false, error: null });
    } catch (error) {
      setState({ busy: false, error });
    }
  };
  return html`<form class="upload" onSubmit=${submit}>
      <label for="export-format">Format</label>
      <select id="export-format" ref=${choice}>${(hasHub ? [...CHOICES, FOR_THE_HUB] : CHOICES).map(([key, name]) => html`<option key=${key} value=${key}>${name}</option>`)}</select>
      ${hasHub && html`<label for="export-repository">Upload to</label>
      <input id="export-repository" ref=${repository} placeholder="ORG/NAME on the Hub (optional)" autocomplete="off" spellcheck="false" />`}
      <button type="submit" class="primary" aria-disabled=${state.busy ? "true" : null}>${state.busy ? "Requesting…" : "Export"}</button>
    </form>
    ${state.error && html`<${Failure} error=${state.error} />`}`;
}

const milliseconds = (seconds) => `${Math.round(1000 * seconds)} ms`;
const nameOf = (row) => [row.format, row.quantization].filter(Boolean).join(" ");

function Row({ row, path, done }) {
  const [error, setError] = useState(null);
  const own = `${path}/exports/${row.id}`;
  const act = async (question, method, target, announcement) => {
    if (!(await confirm(question))) return;
    setError(null);
    try {
      await send(method, target);
      announce(announcement);
      await done();
    } catch (problem) {
      setError(problem);
    }
  };
  const cancel = () => act({ title: `Cancel the export ${nameOf(row)}?`, text: "The worker stops, and nothing is kept.", yes: "Cancel the export", no: "Keep it running", danger: true }, "POST", `${own}/cancel`, "Export canceled");
  const remove = () => act({ title: `Delete the export ${nameOf(row)}?`, text: "Its files are deleted. An upload to the Hub is not.", yes: "Delete the export", no: "Keep the export", danger: true }, "DELETE", own, "Export deleted");
  const { verification, cost } = row;
  return html`<div class="pad">
    <p><span class=${`state state-${row.status}`}><span class="dot" aria-hidden="true"></span>${stateWord(row.status)}</span>
      <b> ${nameOf(row)}</b> ${row.bytes > 0 && html`<span class="soft">${format.bytes(row.bytes)}</span>`} <span class="soft"><${Ago} at=${row.created_at} /></span></p>
    ${verification && html`<p class="soft">Largest logit difference <b>${format.power(verification.max_abs_diff)}</b> (allowed: ${format.power(verification.tolerance)}). ${verification.explanation}
      ${cost && html` A pass takes ${milliseconds(cost.merged_seconds)} merged and ${milliseconds(cost.base_seconds)} without the adapter.`}</p>`}
    ${row.hub_url && html`<p>Uploaded to <code>${row.hub_repository}</code>.</p>`}
    ${row.error && html`<${Failure} error=${row.error} />`}
    ${row.artifact && html`<${Files} own=${own} />`}
    <div class="buttons">${FINAL.has(row.status)
      ? html`<button type="button" class="danger-quiet" onClick=${remove}>Delete<span class="unseen"> the export ${nameOf(row)}</span></button>`
      : html`<button type="button" class="danger-quiet" onClick=${cancel}>Cancel<span class="unseen"> the export ${nameOf(row)}</span></button>`}</div>
    ${error && html`<${Failure} error=${error} />`}
  </div>`;
}

function Files({ own }) {
  const { data, error, reload } = useResource(`${own}/files`);
  if (error) return html`<${Failure} error=${error} retry=${reload} />`;
  return html`<ul class="exports">${(data?.data || []).map((file) => html`<li key=${file.path}><a href=${`${own}/files/${file.path.split("/").map(encodeURIComponent).join("/")}`} download>${file.path}</a> <span class="soft">${format.bytes(file.num_bytes)}</span></li>`)}</ul>`;
}
