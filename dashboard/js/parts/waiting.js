// Why a job does not train yet, in the scheduler's own words.
import { html, useEffect } from "../html.js";
import { useResource } from "../resource.js";
import { useNow } from "../clock.js";
import * as format from "../format.js";

/** In a list: its turn and the reason for it, from the queue's entry of the job. */
export function Place({ job, entry }) {
  const now = useNow();
  if (job.status === "validating_files") return html`<span class="why">${READING}</span>`;
  const again = job.run_after > now ? `Tried again in ${format.duration(job.run_after - now)}. ` : "";
  const turn = entry?.position ? html`<b>${ordinal(entry.position)} in the queue</b>` : null;
  return html`<span class="why">${again}${turn}${turn && entry.reason ? ": " : ""}${entry?.reason || (turn ? "" : "Waits for its turn.")}</span>`;
}

const READING = "Its files are tokenised before it can take its turn.";

export function ordinal(number) {
  const last = number % 100 > 10 && number % 100 < 14 ? 0 : number % 10;
  return `${number}${["th", "st", "nd", "rd"][last] || "th"}`;
}

/** On the job's page: the whole answer, read again whenever the job is. */
export function Why({ job }) {
  const { data, reload } = useResource(`/v1/fine_tuning/jobs/${job.id}/why`);
  useEffect(() => { reload(); }, [job]);
  return html`<span class="why">${data ? sentence(data) : "…"}</span>`;
}

export function sentence(why) {
  return why.explanation || "Waits for a worker.";
}
