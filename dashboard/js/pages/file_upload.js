// Upload of a file. The service checks training data line by line, and its errors name the lines.
import { html, useRef, useState } from "../html.js";
import { send } from "../api.js";
import { announce } from "../parts/announce.js";
import { Panel } from "../parts/basics.js";
import * as format from "../format.js";

const PURPOSES = [["fine-tune", "Training or validation data"], ["user_data", "Other data"]];
const NOTHING = { busy: false, error: null, made: null };

export function Upload({ done }) {
  const [state, setState] = useState(NOTHING);
  const field = useRef(null);
  const purpose = useRef(null);
  const submit = async (event) => {
    event.preventDefault();
    if (state.busy) return;
    const [file] = field.current.files;
    if (!file) return refuse({ message: "No file is selected.", remedy: "Select a file first." });
    setState({ ...NOTHING, busy: true });
    try {
      const made = await send("POST", "/v1/files", form(purpose.current.value, file));
      setState({ ...NOTHING, made });
      field.current.value = "";
      announce(summaryOf(made));
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
    <p id="upload-hint" class="upload-hint soft">One row per line: <code>${'{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'}</code>,
      <code>${'{"prompt": "…", "completion": "…"}'}</code>, <code>${'{"text": "…"}'}</code>,
      <code>${'{"prompt": "…", "completion": "…", "label": true}'}</code>, or a preference pair in OpenAI's format.</p>
    <div id="upload-error" role="alert">${state.error && html`<${Refusal} error=${state.error} />`}</div>
    ${state.made && html`<p class="result result-good">${summaryOf(state.made)}</p>`}
  <//>`;
}

/** The purpose comes first, because the service parses the form while it arrives. */
function form(purpose, file) {
  const fields = new FormData();
  fields.append("purpose", purpose);
  fields.append("file", file, file.name);
  return fields;
}

const summaryOf = (file) => `${file.filename} was uploaded: ${typeof file.rows === "number" ? `${format.plural(file.rows, "row")}, ` : ""}${format.bytes(file.bytes)}.${file.same_content_as ? ` ${file.same_content_as} has the same content.` : ""}`;

/** One list item for each line of the file that the message names, then the remedy. */
function Refusal({ error: { message, remedy } }) {
  const sentences = message.split(/(?<=\.) (?=Line \d|Reading stopped)/);
  return html`<div class="result result-bad"><p><b>Upload rejected${sentences.length > 1 ? ". Fix these lines:" : "."}</b></p>
    <ul>${sentences.map((sentence) => html`<li key=${sentence}>${sentence}</li>`)}</ul>${remedy && html`<p>${remedy}</p>`}</div>`;
}
