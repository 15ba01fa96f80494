// Pause, resume, cancel: asked once more before they are done, and told how they went.
import { html, useState } from "../html.js";
import { send } from "../api.js";
import { announce } from "../parts/announce.js";
import { Failure } from "../parts/basics.js";
import { confirm } from "../parts/confirm.js";
import { jobName } from "../parts/progress.js";

const WORDS = {
  pause: { verb: "Pause", text: "Its place on the trainer is given to another job. Its last checkpoint is kept, and it goes on from there when it is resumed.", no: "Keep it running" },
  resume: { verb: "Resume", text: "It goes back to the queue and continues from its last checkpoint.", no: "Leave it paused" },
  cancel: { verb: "Cancel", text: "It ends without an adapter. A cancelled job can't be resumed.", no: "Keep the job", danger: true },
};

const ALLOWED = { validating_files: ["pause", "cancel"], queued: ["pause", "cancel"], running: ["pause", "cancel"], paused: ["resume", "cancel"] };

export function Actions({ job, done }) {
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(null);
  const asked = (action) => (action === "cancel" && job.cancel_requested) || (action === "pause" && (job.pause_requested || job.cancel_requested));
  const run = async (action) => {
    const words = WORDS[action];
    const question = { title: `${words.verb} ${jobName(job)}?`, text: words.text, yes: `${words.verb} the job`, no: words.no, danger: words.danger };
    if (!(await confirm(question))) return;
    setBusy(action);
    setError(null);
    try {
      await send("POST", `/v1/fine_tuning/jobs/${job.id}/${action}`);
      announce(`${words.verb} was asked for`);
      await done();
    } catch (problem) {
      setError(problem);
    }
    setBusy(null);
  };
  const actions = ALLOWED[job.status] || [];
  return html`${actions.length > 0 && html`<div class="buttons actions">${actions.map((action) => html`
      <button type="button" key=${action} class=${WORDS[action].danger ? "danger-quiet" : ""} disabled=${Boolean(busy) || asked(action)}
        onClick=${() => run(action)}>${WORDS[action].verb}</button>`)}</div>`}
    ${error && html`<${Failure} error=${error} />`}`;
}
