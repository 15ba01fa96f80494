// Cordon, uncordon, drain: an operator's, asked once more before they are done.
import { html, useState } from "../html.js";
import { send } from "../api.js";
import { announce } from "../parts/announce.js";
import { Failure } from "../parts/basics.js";
import { confirm } from "../parts/confirm.js";

const WORDS = {
  cordon: { verb: "Cordon", text: "It finishes what it holds and takes no new job. What starts in its place takes none either.", no: "Let it take jobs" },
  uncordon: { verb: "Uncordon", text: "It takes jobs again. What failed on it before counts no more.", no: "Keep it cordoned" },
  drain: { verb: "Drain", text: "It saves its jobs, gives them back to the queue and ends. What starts in its place is cordoned.", no: "Keep it running", danger: true },
};

export function WorkerActions({ worker, done }) {
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const run = async (action) => {
    const words = WORDS[action];
    const question = { title: `${words.verb} ${worker.host || worker.id}?`, text: words.text, yes: `${words.verb} the worker`, no: words.no, danger: words.danger };
    if (!(await confirm(question))) return;
    setBusy(true);
    setError(null);
    try {
      await send("POST", `/v1/workers/${encodeURIComponent(worker.id)}/${action}`);
      announce(`${words.verb} was asked for`);
      await done();
    } catch (problem) {
      setError(problem);
    }
    setBusy(false);
  };
  const isThere = worker.state !== "ended" && worker.state !== "draining";
  const actions = [worker.cordon ? "uncordon" : isThere && "cordon", isThere && "drain"].filter(Boolean);
  return html`${actions.length > 0 && html`<div class="buttons actions">${actions.map((action) => html`
      <button type="button" key=${action} class=${WORDS[action].danger ? "danger-quiet" : ""} disabled=${busy} onClick=${() => run(action)}>${WORDS[action].verb}</button>`)}</div>`}
    ${error && html`<${Failure} error=${error} />`}`;
}
