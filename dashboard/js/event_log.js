// A job's events for its page: read page by page from the newest back, and updated by the job's stream.
// Metrics events are omitted unless the user shows them, so a long history takes few requests.
import { query, read } from "./api.js";

/** Events of one request, and events of one step back in the history. */
const PAGE = 100;
const BATCH = 300;

export class EventLog {
  constructor(jobPath) {
    this.path = `${jobPath}/events`;
    this.withMetrics = false;
    this.lastTask = Promise.resolve();
    this.forget();
  }

  /** Add an event of the stream. The stream starts with the first event of the job, so it also has events older than those read. */
  take(event) {
    if (this.withMetrics || event.type !== "metrics") this.events.set(event.id, event);
  }

  /** Read the newest events, back to those that were read before. */
  refresh() {
    return this.enqueue(() => this.readBack(null));
  }

  /** Read one batch further back. */
  older() {
    return this.enqueue(() => this.readBack(this.oldest));
  }

  async showMetrics(withMetrics) {
    this.withMetrics = withMetrics;
    this.forget();
    await this.refresh();
  }

  /** The events to show: newest first, without gaps. */
  shown() {
    const events = [...this.events.values()].filter((event) => !this.hasOlder || sequence(event.id) >= sequence(this.oldest));
    return events.sort((a, b) => sequence(b.id) - sequence(a.id));
  }

  forget() {
    this.events = new Map();
    this.oldest = null;
    this.hasOlder = false;
  }

  /** Run `task` after all earlier ones. Concurrent reads would both set the oldest event, and leave a gap between them. */
  enqueue(task) {
    const result = this.lastTask.then(task);
    this.lastTask = result.catch(() => {});
    return result;
  }

  /** Read one batch. If a request fails, its earlier pages are discarded: they would hide the gap from the next read. */
  async readBack(after) {
    const { events } = this;
    const found = [];
    const type = this.withMetrics ? null : "message";
    for (let number = 0; number < BATCH; number += PAGE) {
      const { data, has_more } = await read(`${this.path}${query({ limit: PAGE, type, after })}`);
      if (events !== this.events) return; // `showMetrics` was called meanwhile
      found.push(...data);
      const isJoined = this.oldest !== null && data.some(({ id }) => events.has(id) && sequence(id) >= sequence(this.oldest));
      if (isJoined) { this.keep(found, this.oldest, this.hasOlder); return; }
      after = data.at(-1)?.id ?? after;
      if (!has_more) { this.keep(found, after, false); return; }
    }
    this.keep(found, after, true);
  }

  keep(found, oldest, hasOlder) {
    found.forEach((event) => this.take(event));
    this.oldest = oldest;
    this.hasOlder = hasOlder;
  }
}

/** The sequence number in an event's id, which orders events. */
const sequence = (id) => Number(id.split("-").at(-1));
