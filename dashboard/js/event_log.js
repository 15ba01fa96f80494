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
    this.lastLook = Promise.resolve();
    this.forget();
  }

  /** What the stream tells: it begins with the job's first event, so much of it lies before what was read. */
  take(event) {
    if (this.withMetrics || event.type !== "metrics") this.events.set(event.id, event);
  }

  /** Read the newest, back to what is held already. */
  refresh() {
    return this.inTurn(() => this.readBack(null));
  }

  /** Read one look further back. */
  older() {
    return this.inTurn(() => this.readBack(this.oldest));
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

  /** Looks beside each other would each say how far back the log reaches, and leave a gap between them. */
  inTurn(look) {
    const turn = this.lastLook.then(look);
    this.lastLook = turn.catch(() => {});
    return turn;
  }

  /** A page of a look that fails half-way is forgotten: kept, it would hide the gap behind it from the next look. */
  async readBack(after) {
    const { events } = this;
    const found = [];
    const type = this.withMetrics ? null : "message";
    for (let number = 0; number < LOOK; number += PAGE) {
      const { data, has_more } = await read(`${this.path}${query({ limit: PAGE, type, after })}`);
      if (events !== this.events) return; // the other kind was asked for meanwhile
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

/** The number in an event's id, by which events are ordered. */
const sequence = (id) => Number(id.split("-").at(-1));
