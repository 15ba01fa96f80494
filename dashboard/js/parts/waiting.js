// Why a job does not train yet, in the scheduler's own words.
import { html, useEffect } from "../html.js";
import { useResource } from "../resource.js";

/** Turns of which a list asks the reason. Those further back wait for the ones before them. */
const ASKED = 10;

/** Where something is still to be said that the job itself doesn't tell. */
const ASKABLE = new Set(["validating_files", "queued", "running"]);

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
  return useWhy(job, turn)?.explanation || "…";
}

/** {explanation, placements, …}; null before it is there, and without a job or where it is asked no more. */
export function useWhy(job, turn) {
  const { data, reload } = useResource(job && ASKABLE.has(job.status) ? `/v1/fine_tuning/jobs/${encodeURIComponent(job.id)}/why` : null);
  useEffect(() => { reload(); }, [job?.status, job?.attempt, job?.run_after, turn]);
  return data;
}
