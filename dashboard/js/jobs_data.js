// The list of jobs as a page holds it: read by pages of the API, moved along by the queue's stream, and read again
// when a job has come, gone or changed its state.
import { useCallback, useEffect, useRef, useState } from "./html.js";
import { query, read } from "./api.js";
import { listen, throttle } from "./live.js";
import { announce } from "./parts/announce.js";
import { FINAL, stateWord } from "./parts/basics.js";
import { jobName } from "./parts/progress.js";
import { useCurves } from "./curves_data.js";

const PAGE = 50;
const RELOAD_MS = 1000;
const OLDEST_MS = 15000;
const QUEUE = "/v1/queue/stream";
const NOTHING = { jobs: [], queue: {}, hasMore: false, error: null, loading: true, readAt: 0 };

/** {jobs, queue, hasMore, more, error, loading, curves, reload}; `queue` and `curves` map a job's id to its entry and points. */
export function useJobs() {
  const [state, setState] = useState(NOTHING);
  const held = useRef(NOTHING);
  const pages = useRef(1);
  const heard = useRef(null);
  const put = (next) => { held.current = next; setState(next); };

  const reload = useCallback(async () => {
    const heardBefore = heard.current;
    try {
      const [{ jobs, hasMore }, snapshot] = await Promise.all([readPages(pages.current), read("/v1/queue")]);
      tellChanges(held.current.jobs, jobs);
      const found = { jobs, queue: byId(snapshot), hasMore, error: null, loading: false, readAt: Date.now() };
      put(heard.current === heardBefore ? found : withProgress(found, heard.current)); // the stream's is newer than what was read
    } catch (error) {
      put({ ...held.current, error, loading: false });
    }
  }, []);

  useEffect(() => {
    const soon = throttle(reload, RELOAD_MS);
    soon();
    const moved = (snapshot) => {
      heard.current = snapshot;
      if (Date.now() - held.current.readAt > OLDEST_MS || isOutdated(held.current, snapshot)) soon();
      else put(withProgress(held.current, snapshot));
    };
    const close = listen(QUEUE, { queue: moved }, soon);
    return () => { soon.cancel(); close(); };
  }, []);

  const more = () => { pages.current += 1; return reload(); };
  return { ...state, curves: useCurves(state.jobs), reload, more };
}

/** Run `reload` now, whenever the queue of `path` moves (once a second at most) and at each reconnection. */
export function useLive(reload, path = QUEUE) {
  useEffect(() => {
    const soon = throttle(reload, RELOAD_MS);
    soon();
    const close = listen(path, { queue: soon }, soon);
    return () => { soon.cancel(); close(); };
  }, []);
}

async function readPages(number) {
  const jobs = [];
  let after = null;
  for (let page = 0; page < number; page += 1) {
    const { data, has_more } = await read(`/v1/fine_tuning/jobs${query({ limit: PAGE, after })}`);
    jobs.push(...data);
    if (!has_more || !data.length) return { jobs, hasMore: false };
    after = data.at(-1).id;
  }
  return { jobs, hasMore: true };
}

const byId = (snapshot) => Object.fromEntries(snapshot.jobs.map((entry) => [entry.job_id, entry]));

/** Whether the queue knows of a job, an end or a change of state that the list does not. */
function isOutdated({ jobs, hasMore }, snapshot) {
  const entries = byId(snapshot);
  const states = new Map(jobs.map((job) => [job.id, job.status]));
  const oldest = hasMore ? jobs.at(-1).created_at : -Infinity;
  const isNews = (entry) => (states.has(entry.job_id) ? states.get(entry.job_id) !== entry.state : entry.created_at >= oldest);
  return snapshot.jobs.some(isNews) || jobs.some((job) => !FINAL.has(job.status) && !entries[job.id]);
}

function withProgress(held, snapshot) {
  const queue = byId(snapshot);
  const jobs = held.jobs.map((job) => (queue[job.id]?.progress ? { ...job, progress: queue[job.id].progress } : job));
  return { ...held, jobs, queue };
}

function tellChanges(before, after) {
  const states = new Map(before.map((job) => [job.id, job.status]));
  const moved = after.filter((job) => states.has(job.id) && states.get(job.id) !== job.status);
  if (moved.length) announce(moved.map((job) => `${jobName(job)} is ${stateWord(job.status)}`).join(". "));
}
