// A job's events as its page holds them: read back from the newest by pages of the API, moved along by its stream.
// Points of training are left out until they are asked for, so a long history takes few requests.
import { query, read } from "./api.js";

/** As many as the API gives at once, and as one look at the history goes back. */
const PAGE = 100;
const LOOK = 300;

export class EventLog {
  constructor(jobPath) {
    this.path = `${jobPath}/events`;
    this.withMetrics = false;
    this.forget();
  }

  /** What the stream tells: it begins with the job's first event, so much of it lies before what was read. */
  take(event) {
    if (this.withMetrics || event.type !== "metrics") this.events.set(event.id, event);
  }

  /** Read the newest, back to what is held already. */
  refresh() {
    return this.readBack(null);
  }

  /** Read one look further back. */
  older() {
    return this.readBack(this.oldest);
  }

  async showMetrics(withMetrics) {
    this.withMetrics = withMetrics;
    this.forget();
    await this.refresh();
  }

  /** Newest first, without gaps. */
  shown() {
    const events = [...this.events.values()].filter((event) => !this.hasOlder || sequence(event.id) >= sequence(this.oldest));
    return events.sort((a, b) => sequence(b.id) - sequence(a.id));
  }

  forget() {
    this.events = new Map();
    this.oldest = null;
    this.hasOlder = false;
  }

  async readBack(after) {
    const { events } = this;
    const type = this.withMetrics ? null : "message";
    for (let number = 0; number < LOOK; number += PAGE) {
      const { data, has_more } = await read(`${this.path}${query({ limit: PAGE, type, after })}`);
      if (events !== this.events) return; // the other kind was asked for meanwhile
      const isJoined = this.oldest !== null && data.some(({ id }) => events.has(id) && sequence(id) >= sequence(this.oldest));
      data.forEach((event) => this.take(event));
      if (isJoined) return;
      after = data.at(-1)?.id ?? after;
      if (!has_more) { this.reach(after, false); return; }
    }
    this.reach(after, true);
  }

  reach(oldest, hasOlder) {
    this.oldest = oldest;
    this.hasOlder = hasOlder;
  }
}

/** The number in an event's id, by which events are ordered. */
const sequence = (id) => Number(id.split("-").at(-1));
