// Why a job does not train yet, in the scheduler's own words.
import { html, useEffect } from "../html.js";
import { useResource } from "../resource.js";

/** Turns of which a list asks the reason. Those further back wait for the ones before them. */
const ASKED = 10;

/** In a list: its turn, and why it has not come. `entry` is the queue's. */
export function Place({ job, entry }) {
  const turn = entry?.position;
  if (job.status === "queued" && turn > ASKED) return html`<span class="why"><b>${ordinal(turn)} in the queue</b></span>`;
  return html`<span class="why">${turn > 1 && html`<b>${ordinal(turn)} in the queue.</b> `}<${Why} job=${job} turn=${turn} /></span>`;
}

export function ordinal(number) {
  const last = number % 100 > 10 && number % 100 < 14 ? 0 : number % 10;
  return `${number}${["th", "st", "nd", "rd"][last] || "th"}`;
}

/** The whole answer, asked again whenever the job or its turn has changed. */
export function Why({ job, turn }) {
  const { data, reload } = useResource(`/v1/fine_tuning/jobs/${job.id}/why`);
  useEffect(() => { reload(); }, [job.status, job.attempt, job.run_after, turn]);
  return data?.explanation || "…";
}
