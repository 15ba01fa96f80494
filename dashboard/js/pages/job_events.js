// The job's log, newest first. Training points are curves already, so they are left out unless asked for.
import { html, useState } from "../html.js";
import { MESSAGES } from "../job_data.js";
import { Ago, Panel } from "../parts/basics.js";

export function Events({ job, events, hasOlder, older }) {
  const [withMetrics, setWithMetrics] = useState(false);
  const [limit, setLimit] = useState(MESSAGES);
  const wanted = withMetrics ? events : events.filter((event) => event.type !== "metrics");
  const more = async () => { if (hasOlder) await older(); setLimit(limit + MESSAGES); };
  const toggle = html`<label class="check"><input type="checkbox" checked=${withMetrics} onChange=${(event) => setWithMetrics(event.currentTarget.checked)} /> with metrics</label>`;
  return html`<${Panel} title="Events" id="events" aside=${toggle}>
    <div class="scroll events-scroll" tabindex="0" role="region" aria-label=${`Events of ${job.id}, newest first`}>
      ${wanted.length === 0 ? html`<p class="soft pad">Nothing yet.</p>` : html`<ol class="events">${wanted.slice(0, limit).map((event) => html`
        <li key=${event.id} class=${`event event-${event.level}`}>
          <${Ago} at=${event.created_at} />
          <span class="event-text">${event.level !== "info" && html`<b class="event-level">${event.level === "warn" ? "warning" : event.level}</b>`}${event.message}</span></li>`)}</ol>`}
      ${(wanted.length > limit || hasOlder) && html`<p class="more"><button type="button" onClick=${more}>Older events</button></p>`}
    </div>
  <//>`;
}
