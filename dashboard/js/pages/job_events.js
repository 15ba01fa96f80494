// The events of a job, newest first. Metrics events are omitted by default, because the curves show them.
import { html } from "../html.js";
import { Ago, Panel } from "../parts/basics.js";

export function Events({ job, events: { list, hasOlder, withMetrics }, older, showMetrics }) {
  const toggle = html`<label class="check"><input type="checkbox" checked=${withMetrics} onChange=${(event) => showMetrics(event.currentTarget.checked)} /> with metrics</label>`;
  return html`<${Panel} title="Events" id="events" aside=${toggle}>
    <div class="scroll events-scroll" tabindex="0" role="region" aria-label=${`Events of ${job.id}, newest first`}>
      ${list.length === 0 ? html`<p class="soft pad">No events yet.</p>` : html`<ol class="events">${list.map((event) => html`
        <li key=${event.id} class=${`event event-${event.level}`}>
          <${Ago} at=${event.created_at} />
          <span class="event-text">${event.level !== "info" && html`<b class="event-level">${event.level === "warn" ? "warning" : event.level}</b>`}${event.message}${event.data?.samples && html`<${Answers} samples=${event.data.samples} />`}</span></li>`)}</ol>`}
      ${hasOlder && html`<p class="more"><button type="button" onClick=${older}>Older events</button></p>`}
    </div>
  <//>`;
}

/** The model's answers to the job's sample prompts at an evaluation. */
function Answers({ samples }) {
  return html`<details><summary>Show samples</summary><dl>${samples.map(({ prompt, answer, is_complete }, index) => html`
    <dt key=${`prompt-${index}`}><b>${prompt}</b></dt><dd key=${`answer-${index}`}>${answer}${!is_complete && " …"}</dd>`)}</dl></details>`;
}
