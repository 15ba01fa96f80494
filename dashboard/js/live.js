// Server-sent events, and the state of their connections. The browser resends Last-Event-ID automatically.
// Listeners of one path share a connection, because a browser opens only six per host. A hidden page has none.
import { read } from "./api.js";
import { createStore } from "./store.js";

/** idle (no stream), connecting, live, lost. */
export const connection = createStore("idle");
const FIRST_RETRY_MS = 1000;
const LONGEST_RETRY_MS = 15000;
const streams = new Map();

/**
 * Listen to `path` until the returned function is called. `handlers` maps the name of an event to a function of its
 * parsed data. `onOpen` runs after each connection, to read again what was missed.
 */
export function listen(path, handlers, onOpen) {
  const stream = streams.get(path) || new Stream(path);
  streams.set(path, stream);
  const listener = { handlers, onOpen };
  stream.add(listener);
  return () => {
    if (stream.listeners.delete(listener) && !stream.listeners.size) {
      streams.delete(path);
      stream.close();
      show();
    }
  };
}

document.addEventListener("visibilitychange", () => {
  for (const stream of streams.values()) document.hidden ? stream.close() : stream.open();
});

function show() {
  const states = [...streams.values()].map((stream) => stream.state);
  connection.set(["lost", "connecting", "live"].find((state) => states.includes(state)) || "idle");
}

class Stream {
  constructor(path) {
    this.path = path;
    this.listeners = new Set();
    this.subscribed = new Set();
    this.wait = FIRST_RETRY_MS;
    this.state = "connecting";
  }

  add(listener) {
    this.listeners.add(listener);
    if (!this.source && !document.hidden) this.open();
    for (const name of Object.keys(listener.handlers)) this.subscribe(name);
    show();
  }

  open() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = new EventSource(this.path);
    this.source.onopen = () => this.opened();
    this.source.onerror = () => this.failed();
    const names = [...this.subscribed];
    this.subscribed.clear();
    names.forEach((name) => this.subscribe(name));
  }

  subscribe(name) {
    if (this.subscribed.has(name)) return;
    this.subscribed.add(name);
    this.source?.addEventListener(name, (event) => {
      const data = parse(event.data);
      for (const { handlers } of [...this.listeners]) if (data !== null) handlers[name]?.(data);
    });
  }

  opened() {
    this.wait = FIRST_RETRY_MS;
    this.state = "live";
    show();
    for (const { onOpen } of [...this.listeners]) onOpen?.();
  }

  failed() {
    this.state = "lost";
    show();
    if (this.source.readyState !== EventSource.CLOSED) return;
    // An EventSource reports a rejected sign-in and an outage in the same way; an ordinary request distinguishes them.
    this.timer = setTimeout(() => read("/v1/queue").catch(() => {}).finally(() => { if (this.listeners.size) this.open(); }), this.wait);
    this.wait = Math.min(this.wait * 2, LONGEST_RETRY_MS);
  }

  close() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Run `run` at most once per `milliseconds`: the first call immediately; calls during the wait cause one run after it. */
export function throttle(run, milliseconds) {
  let timer = null;
  let again = false;
  const tick = () => {
    timer = null;
    if (again) start();
  };
  const start = () => {
    again = false;
    timer = setTimeout(tick, milliseconds);
    run();
  };
  const call = () => { if (timer === null) start(); else again = true; };
  call.cancel = () => { clearTimeout(timer); again = false; };
  return call;
}
