// Sending a file. The service reads data to train on line by line: what it refuses is shown with the lines' numbers.
import { html, useRef, useState } from "../html.js";
import { send } from "../api.js";
import { announce } from "../parts/announce.js";
import { Panel } from "../parts/basics.js";
import * as format from "../format.js";

const PURPOSES = [["fine-tune", "Data to train on, or held out"], ["user_data", "Other data"]];
const NOTHING = { busy: false, error: null, made: null };

export function Upload({ done }) {
  const [state, setState] = useState(NOTHING);
  const field = useRef(null);
  const purpose = useRef(null);
  const submit = async (event) => {
    event.preventDefault();
    if (state.busy) return;
    const [file] = field.current.files;
    if (!file) return refuse({ message: "No file was chosen.", remedy: "Choose one first." });
    setState({ ...NOTHING, busy: true });
    try {
      const made = await send("POST", "/v1/files", form(purpose.current.value, file));
      setState({ ...NOTHING, made });
      field.current.value = "";
      announce(told(made));
      await done();
    } catch (error) {
      refuse(error);
    }
  };
  const refuse = (error) => { setState({ ...NOTHING, error }); field.current.focus(); };
  return html`<${Panel} title="Upload a file" id="upload">
    <form class="upload" onSubmit=${submit} novalidate>
      <label for="upload-file">File</label>
      <input id="upload-file" ref=${field} type="file" aria-invalid=${state.error ? "true" : null} aria-describedby=${state.error ? "upload-error" : "upload-hint"} />
      <label for="upload-purpose">Purpose</label>
      <select id="upload-purpose" ref=${purpose}>${PURPOSES.map(([key, name]) => html`<option key=${key} value=${key}>${name}</option>`)}</select>
      <button type="submit" class="primary" aria-disabled=${state.busy ? "true" : null}>${state.busy ? "Uploading…" : "Upload"}</button>
    </form>
    <p id="upload-hint" class="upload-hint soft">One conversation on each line: <code>${'{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'}</code>,
      or <code>${'{"prompt": "…", "completion": "…"}'}</code>, or <code>${'{"text": "…"}'}</code>; or a pair of answers to compare, as OpenAI writes them;
      or <code>${'{"prompt": "…", "completion": "…", "label": true}'}</code></p>
    <div id="upload-error" role="alert">${state.error && html`<${Refusal} error=${state.error} />`}</div>
    ${state.made && html`<p class="result result-good">${told(state.made)}</p>`}
  <//>`;
}

/** The purpose goes first: the service reads the form as it arrives. */
function form(purpose, file) {
  const fields = new FormData();
  fields.append("purpose", purpose);
  fields.append("file", file, file.name);
  return fields;
}

const told = (file) => `${file.filename} was uploaded: ${typeof file.rows === "number" ? `${format.plural(file.rows, "row")}, ` : ""}${format.bytes(file.bytes)}.${file.same_content_as ? ` The same content was there already, as ${file.same_content_as}.` : ""}`;

/** One line for each line of the file that the message names, then what to do. */
function Refusal({ error: { message, remedy } }) {
  const sentences = message.split(/(?<=\.) (?=Line \d|Reading stopped)/);
  return html`<div class="result result-bad"><p><b>It was not taken${sentences.length > 1 ? ", for these lines" : ""}.</b></p>
    <ul>${sentences.map((sentence) => html`<li key=${sentence}>${sentence}</li>`)}</ul>${remedy && html`<p>${remedy}</p>`}</div>`;
}
