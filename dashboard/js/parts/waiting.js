// The explanation of the API why a job does not train yet.
import { html, useEffect } from "../html.js";
import { useResource } from "../resource.js";

/** A list requests the explanation up to this queue position. Jobs further back wait for those ahead of them. */
const ASKED = 10;

/** States for which the explanation has more than the job itself. */
const ASKABLE = new Set(["validating_files", "queued", "running"]);

/** In a list: the queue position, and why the job waits. `entry` is its entry in the queue. */
export function Place({ job, entry }) {
  const position = entry?.position;
  if (job.status === "queued" && position > ASKED) return html`<span class="why"><b>${ordinal(position)} in the queue</b></span>`;
  return html`<span class="why">${position > 1 && html`<b>${ordinal(position)} in the queue.</b> `}<${Why} job=${job} position=${position} /></span>`;
}

export function ordinal(number) {
  const last = number % 100 > 10 && number % 100 < 14 ? 0 : number % 10;
  return `${number}${["th", "st", "nd", "rd"][last] || "th"}`;
}

/** The whole explanation, requested again when the job or its position has changed. */
export function Why({ job, position }) {
  return useWhy(job, position)?.explanation || "…";
}

/** {explanation, placements, …}; null before the response, without a job, and in states without an explanation. */
export function useWhy(job, position) {
  const { data, reload } = useResource(job && ASKABLE.has(job.status) ? `/v1/fine_tuning/jobs/${encodeURIComponent(job.id)}/why` : null);
  useEffect(() => { reload(); }, [job?.status, job?.attempt, job?.run_after, position]);
  return data;
}
