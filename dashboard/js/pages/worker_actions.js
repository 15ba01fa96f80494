// Cordon, uncordon and drain a worker, each with a confirmation. Only operators can do this.
import { html, useState } from "../html.js";
import { send } from "../api.js";
import { announce } from "../parts/announce.js";
import { Failure } from "../parts/basics.js";
import { confirm } from "../parts/confirm.js";

const WORDS = {
  cordon: { verb: "Cordon", text: "The worker finishes its jobs and accepts no new ones. A worker that restarts on these devices stays cordoned.", no: "Cancel" },
  uncordon: { verb: "Uncordon", text: "The worker accepts jobs again. Earlier failures on it no longer count.", no: "Cancel" },
  drain: { verb: "Drain", text: "The worker saves its jobs, returns them to the queue and exits. A worker that restarts on these devices stays cordoned.", no: "Cancel", danger: true },
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
      announce(`${words.verb} requested`);
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
