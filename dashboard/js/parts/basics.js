// Small components that every page uses: states, times, empty lists, errors, ids with a copy button.
import { html, useState } from "../html.js";
import { useNow } from "../clock.js";
import * as format from "../format.js";
import { announce } from "./announce.js";

export const FINAL = new Set(["succeeded", "failed", "cancelled"]);
const WORDS = {
  validating_files: "tokenizing files", queued: "queued", running: "running", paused: "paused",
  succeeded: "succeeded", failed: "failed", cancelled: "cancelled",
};

/** Phases of a running job in which it does not train. */
const PHASES = { loading: "loading model", verifying: "verifying" };

export const stateWord = (status) => WORDS[status] || status;

/** The state of a job, or a requested change that has not happened yet. */
export function State({ job }) {
  const asked = job.status === "running" && (job.cancel_requested ? "canceling" : job.pause_requested ? "pausing" : null);
  return html`<span class=${`state state-${job.status}`}><span class="dot" aria-hidden="true"></span>${asked || PHASES[job.phase] || stateWord(job.status)}</span>`;
}

/** A relative time, with the absolute time on hover. */
export function Ago({ at }) {
  const now = useNow();
  if (!at) return html`<span class="soft">${format.UNKNOWN}</span>`;
  return html`<time datetime=${new Date(at * 1000).toISOString()} title=${format.absolute(at)}>${format.ago(at, now)}</time>`;
}

/** The time left, and when it ends: "4 min · 14:05". */
export function Until({ seconds, before = "·" }) {
  const now = useNow();
  if (typeof seconds !== "number") return html`<span class="soft">${format.UNKNOWN}</span>`;
  const at = now + seconds;
  return html`<span class="until" title=${`about ${format.absolute(at)}`}>
    <b>${format.duration(seconds)}</b> <span class="soft">${before} ${format.clock(at, now)}</span></span>`;
}

export const Failure = ({ error, retry }) => html`
  <div class="failure" role="alert">
    <p><strong>${error.message}</strong></p>
    ${error.remedy && html`<p>${error.remedy}</p>`}
    ${retry && html`<button type="button" onClick=${retry}>Try again</button>`}
  </div>`;

/** An empty list: a title, an explanation, and a command that adds the first entry. */
export const Empty = ({ title, children, command }) => html`
  <div class="empty">
    <p class="empty-title">${title}</p>
    ${children && html`<p>${children}</p>`}
    ${command && html`<${Command} text=${command} />`}
  </div>`;

export const Command = ({ text }) => html`<div class="command"><code>${text}</code><${Copy} text=${text} what="command" /></div>`;

export function Copy({ text, what }) {
  const [done, setDone] = useState(false);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      announce(`The browser does not allow copying. Select the ${what} and copy it.`);
      return;
    }
    setDone(true);
    announce(`Copied the ${what}`);
    setTimeout(() => setDone(false), 1500);
  };
  return html`<button type="button" class="copy" onClick=${copy} aria-label=${`Copy ${what}`} title=${`Copy ${what}`}>${done ? "copied" : "copy"}</button>`;
}

export const Id = ({ id, what = "id", length }) => html`
  <span class=${length ? "id id-short" : "id"}><code title=${id}>${length ? format.short(id, length) : id}</code><${Copy} text=${id} what=${what} /></span>`;

export const Loading = () => html`<p class="loading" role="status">Loading…</p>`;

export const Panel = ({ title, id, aside, children, wide }) => html`
  <section class=${`panel${wide ? " panel-wide" : ""}`} aria-labelledby=${id}>
    <div class="panel-head"><h2 id=${id}>${title}</h2>${aside}</div>
    ${children}
  </section>`;

/** Names and values: [[name, value, title?], …]. Rows without a value are omitted. */
export const Facts = ({ rows }) => html`
  <dl class="facts">${rows.filter((row) => row && row[1] !== null && row[1] !== undefined && row[1] !== "").map(([name, value, title]) => html`
    <div key=${name}><dt>${name}</dt><dd title=${title}>${value}</dd></div>`)}</dl>`;
