// One job as its page holds it: read at each connection, then moved along by its stream of events.
import { useEffect, useRef, useState } from "./html.js";
import { query, read } from "./api.js";
import { listen } from "./live.js";
import { announce } from "./parts/announce.js";
import { stateWord } from "./parts/basics.js";
import { jobName } from "./parts/progress.js";

const EVENTS = 100;
const DRAW_MS = 250;
const NOTHING = { job: null, events: [], hasMoreEvents: false, train: [], valid: [], attempts: [], report: null, error: null };

/** Everything of NOTHING, and `reload`. Points arrive in bursts: the page is drawn four times a second at most. */
export function useJob(id) {
  const [shown, show] = useState({ ...NOTHING, id });
  const held = useRef(null);
  const reload = useRef(() => {});

  useEffect(() => {
    let closed = false;
    let timer = null;
    held.current = { ...NOTHING, id };
    show(held.current);
    const change = (part) => {
      if (closed) return;
      held.current = { ...held.current, ...part };
      timer ??= setTimeout(() => { timer = null; show(held.current); }, DRAW_MS);
    };
    const again = () => readAll(id).then(change, (error) => change({ error }));
    reload.current = again;
    const close = listen(`${at(id)}/stream`, {
      job: (job) => { if (!job) return; tell(held.current.job, job); moved(held.current.job, job) ? (change({ job }), again()) : change({ job }); },
      event: (event) => event && change({ events: withEvent(held.current.events, event) }),
      metric: (point) => point && change({ [point.kind]: withPoint(held.current[point.kind] || [], point) }),
    }, again);
    again();
    return () => { closed = true; clearTimeout(timer); close(); };
  }, [id]);

  return { ...(shown.id === id ? shown : { ...NOTHING, id }), reload: () => reload.current() };
}

const at = (id) => `/v1/fine_tuning/jobs/${encodeURIComponent(id)}`;

async function readAll(id) {
  const optional = (path) => read(path).catch(() => null);
  const [job, events, train, valid, attempts, report] = await Promise.all([
    read(at(id)), read(`${at(id)}/events${query({ limit: EVENTS })}`),
    read(`${at(id)}/metrics?kind=train`), read(`${at(id)}/metrics?kind=valid`),
    optional(`${at(id)}/attempts`), optional(`${at(id)}/data_report`),
  ]);
  return {
    job, events: events.data, hasMoreEvents: events.has_more, train: train.data, valid: valid.data,
    attempts: attempts?.data || [], report, error: null,
  };
}

export async function olderEvents(id, after) {
  return read(`${at(id)}/events${query({ limit: EVENTS, after })}`);
}

const moved = (was, job) => Boolean(was) && (was.status !== job.status || was.attempt !== job.attempt);

function tell(was, job) {
  if (was && was.status !== job.status) announce(`${jobName(job)} is ${stateWord(job.status)}`);
}

const withEvent = (events, event) => (events.some((one) => one.id === event.id) ? events : [event, ...events]);

/** In order of steps. A step trained again after a resume replaces its point. */
function withPoint(points, point) {
  const last = points.at(-1);
  if (!last || point.step > last.step) return [...points, point];
  return [...points.filter((one) => one.step !== point.step), point].sort((a, b) => a.step - b.step);
}
