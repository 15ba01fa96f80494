// The data of a job's page: read at each connection, then updated by the job's stream until the job is final.
import { useEffect, useRef, useState } from "./html.js";
import { read } from "./api.js";
import { EventLog } from "./event_log.js";
import { listen } from "./live.js";
import { announce } from "./parts/announce.js";
import { FINAL, stateWord } from "./parts/basics.js";
import { jobName } from "./parts/progress.js";

const DRAW_MS = 250;
const NOTHING = { job: null, events: { list: [], hasOlder: false, withMetrics: false }, train: [], valid: [], attempts: [], names: {}, report: null, error: null };

/** The fields of NOTHING, and functions: `reload`; `older` reads older events; `showMetrics` includes or omits metrics events.
 * Points arrive in bursts, so the page is drawn at most four times per second. */
export function useJob(id) {
  const [shown, show] = useState(NOTHING);
  const watch = useRef(null);
  useEffect(() => {
    show(NOTHING);
    watch.current = watchJob(id, show);
    return watch.current.close;
  }, [id]);
  return { ...shown, reload: () => watch.current.reload(), older: () => watch.current.older(), showMetrics: (on) => watch.current.showMetrics(on) };
}

function watchJob(id, show) {
  const held = { job: null, log: new EventLog(at(id)), train: new Map(), valid: new Map(), attempts: [], names: {}, report: null, error: null };
  let timer = null;
  let closed = false;
  let [begun, taken, updates] = [0, 0, 0]; // number of the last read, of the newest read that is shown, and of the stream's updates of the job
  const draw = () => { if (!closed) timer ??= setTimeout(() => { timer = null; show(drawn(held)); }, DRAW_MS); };
  const reading = async (look) => {
    try {
      await look();
    } catch (error) {
      held.error = error;
    }
    draw();
  };
  const reload = async () => {
    const all = async () => {
      const [number, updatesBefore] = [++begun, updates];
      const found = await readAll(id, held.names);
      if (number < taken) return;
      taken = number;
      take(held, updates === updatesBefore ? found : { ...found, job: held.job }); // the stream's job is newer than the one that was read
      draw();
    };
    await reading(async () => { await Promise.all([all(), held.log.refresh()]); held.error = null; });
    if (FINAL.has(held.job?.status) || held.error?.status === 404) stop();
  };
  const stop = listen(`${at(id)}/stream`, {
    job: (job) => { const was = held.job; held.job = job; updates += 1; draw(); if (moved(was, job)) { announceState(job); reload(); } },
    event: (event) => { held.log.take(event); draw(); },
    metric: (point) => { held[point.kind].set(point.step, point); draw(); },
  }, reload);
  reload();
  const older = () => reading(() => held.log.older());
  const showMetrics = (on) => reading(() => held.log.showMetrics(on));
  return { reload, older, showMetrics, close: () => { closed = true; clearTimeout(timer); stop(); } };
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

/** Store what was read, and merge its points with those of the stream. */
function take(held, { job, train, valid, attempts, report, names }) {
  Object.assign(held, { job, attempts, report, names });
  train.forEach((point) => held.train.set(point.step, point));
  valid.forEach((point) => held.valid.set(point.step, point));
}

function drawn(held) {
  const curve = (points) => [...points.values()].sort((a, b) => a.step - b.step);
  const { log } = held;
  const events = { list: log.shown(), hasOlder: log.hasOlder, withMetrics: log.withMetrics };
  return { ...held, train: curve(held.train), valid: curve(held.valid), events };
}

const moved = (was, job) => Boolean(was) && (was.status !== job.status || was.attempt !== job.attempt);

const announceState = (job) => announce(`${jobName(job)} is ${stateWord(job.status)}`);
