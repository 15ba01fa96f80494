// Pause, resume and cancel a job, each with a confirmation and an announcement of the result.
import { html, useState } from "../html.js";
import { send } from "../api.js";
import { announce } from "../parts/announce.js";
import { Failure } from "../parts/basics.js";
import { confirm } from "../parts/confirm.js";
import { jobName } from "../parts/progress.js";

const WORDS = {
  pause: { verb: "Pause", text: "Pausing frees its slot for other jobs. After a resume, the job continues where it stopped.", no: "Keep it running" },
  resume: { verb: "Resume", text: "The job returns to the queue and continues where it stopped.", no: "Leave it paused" },
  cancel: { verb: "Cancel", text: "The job ends without an adapter and can't be resumed.", no: "Keep the job", danger: true },
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
      announce(`${words.verb} requested`);
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
