// The job's log, newest first. Training points are curves already, so they are left out unless asked for.
import { html, useEffect, useState } from "../html.js";
import { Ago, Failure, Panel } from "../parts/basics.js";
import { olderEvents } from "../job_data.js";

export function Events({ job, events, hasMore }) {
  const [withMetrics, setWithMetrics] = useState(false);
  const [older, setOlder] = useState({ events: [], hasMore: null, error: null });
  useEffect(() => setOlder({ events: [], hasMore: null, error: null }), [job.id]);
  const known = new Set(events.map((event) => event.id));
  const all = [...events, ...older.events.filter((event) => !known.has(event.id))];
  const shown = withMetrics ? all : all.filter((event) => event.type !== "metrics");
  const more = async () => {
    try {
      const page = await olderEvents(job.id, all.at(-1).id);
      setOlder((was) => ({ events: [...was.events, ...page.data], hasMore: page.has_more, error: null }));
    } catch (error) {
      setOlder((was) => ({ ...was, error }));
    }
  };
  const toggle = html`<label class="check"><input type="checkbox" checked=${withMetrics} onChange=${(event) => setWithMetrics(event.currentTarget.checked)} /> with metrics</label>`;
  return html`<${Panel} title="Events" id="events" aside=${toggle}>
    <div class="scroll events-scroll" tabindex="0" role="region" aria-label="Events, newest first">
      ${shown.length === 0 ? html`<p class="soft pad">Nothing yet.</p>` : html`<ol class="events">${shown.map((event) => html`
        <li key=${event.id} class=${`event event-${event.level}`}>
          <${Ago} at=${event.created_at} />
          <span class="event-text">${event.level !== "info" && html`<b class="event-level">${event.level === "warn" ? "warning" : event.level}</b>`}${event.message}</span></li>`)}</ol>`}
      ${older.error && html`<${Failure} error=${older.error} />`}
      ${(older.hasMore ?? hasMore) && html`<p class="more"><button type="button" onClick=${more}>Older events</button></p>`}
    </div>
  <//>`;
}
