// One job as its page holds it: read at each connection, then moved along by its stream until it is final.
import { useEffect, useRef, useState } from "./html.js";
import { query, read } from "./api.js";
import { listen } from "./live.js";
import { announce } from "./parts/announce.js";
import { FINAL, stateWord } from "./parts/basics.js";
import { jobName } from "./parts/progress.js";

/** As many as the API gives at once; and the messages that one look at the history goes back, metrics not counted. */
const EVENTS = 100;
export const MESSAGES = 300;
const DRAW_MS = 250;
const NOTHING = { job: null, events: [], hasOlder: false, train: [], valid: [], attempts: [], names: {}, report: null, error: null };

/** Everything of NOTHING, `reload`, and `older`, which reads further back. Points arrive in bursts: the page is drawn four times a second at most. */
export function useJob(id) {
  const [shown, show] = useState(NOTHING);
  const watch = useRef(null);
  useEffect(() => {
    show(NOTHING);
    watch.current = watchJob(id, show);
    return watch.current.close;
  }, [id]);
  return { ...shown, reload: () => watch.current.reload(), older: () => watch.current.older() };
}

function watchJob(id, show) {
  const held = { job: null, events: new Map(), hasOlder: false, messages: MESSAGES, train: new Map(), valid: new Map(), attempts: [], names: {}, report: null, error: null };
  let timer = null;
  let closed = false;
  const draw = () => { if (!closed) timer ??= setTimeout(() => { timer = null; show(drawn(held)); }, DRAW_MS); };
  const reload = async () => {
    try {
      take(held, await readAll(id, held.names));
      draw();
      await readEvents(id, held, () => closed);
    } catch (error) {
      held.error = error;
    }
    draw();
    if (FINAL.has(held.job?.status) || held.error?.status === 404) stop();
  };
  const older = () => { held.messages += MESSAGES; return reload(); };
  const stop = listen(`${at(id)}/stream`, {
    job: (job) => { const was = held.job; held.job = job; draw(); if (moved(was, job)) { tell(job); reload(); } },
    event: (event) => { held.events.set(event.id, event); draw(); },
    metric: (point) => { held[point.kind].set(point.step, point); draw(); },
  }, reload);
  reload();
  return { reload, older, close: () => { closed = true; clearTimeout(timer); stop(); } };
}

const at = (id) => `/v1/fine_tuning/jobs/${encodeURIComponent(id)}`;

async function readAll(id, names) {
  const [job, train, valid, attempts, report] = await Promise.all([
    read(at(id)), read(`${at(id)}/metrics?kind=train`), read(`${at(id)}/metrics?kind=valid`),
    read(`${at(id)}/attempts`), read(`${at(id)}/data_report`),
  ]);
  const mates = new Set(attempts.data.flatMap((attempt) => attempt.packmates).filter((mate) => !names[mate]));
  const named = await Promise.all([...mates].map((mate) => read(at(mate)).then((one) => [mate, jobName(one)], () => [mate, null])));
  return { job, train: train.data, valid: valid.data, attempts: attempts.data, report, names: { ...names, ...Object.fromEntries(named) } };
}

/** The newest events, page by page, until the first one or until `held.messages` of them are not metrics. */
async function readEvents(id, held, isClosed) {
  let page = { data: [], has_more: true };
  let messages = 0;
  while (page.has_more && messages < held.messages && !isClosed()) {
    page = await read(`${at(id)}/events${query({ limit: EVENTS, after: page.data.at(-1)?.id })}`);
    page.data.forEach((event) => held.events.set(event.id, event));
    messages += page.data.filter((event) => event.type !== "metrics").length;
  }
  held.hasOlder = page.has_more;
}

/** What was read, over what the stream brought meanwhile. */
function take(held, { job, train, valid, attempts, report, names }) {
  Object.assign(held, { job, attempts, report, names, error: null });
  train.forEach((point) => held.train.set(point.step, point));
  valid.forEach((point) => held.valid.set(point.step, point));
}

function drawn(held) {
  const curve = (points) => [...points.values()].sort((a, b) => a.step - b.step);
  return { ...held, train: curve(held.train), valid: curve(held.valid), events: [...held.events.values()].sort((a, b) => sequence(b) - sequence(a)) };
}

/** The number in an event's id, by which events are ordered. */
const sequence = (event) => Number(event.id.split("-").at(-1));

const moved = (was, job) => Boolean(was) && (was.status !== job.status || was.attempt !== job.attempt);

const tell = (job) => announce(`${jobName(job)} is ${stateWord(job.status)}`);
