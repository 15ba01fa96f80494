// The list of jobs for a page: read page by page, updated by the queue's stream, and read again when a job was
// created, has finished or has changed its state.
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

/** {jobs, queue, hasMore, more, error, loading, curves, reload}; `queue` and `curves` map a job's id to its queue entry and its points. */
export function useJobs() {
  const [state, setState] = useState(NOTHING);
  const held = useRef(NOTHING);
  const pages = useRef(1);
  const latest = useRef(null);
  const put = (next) => { held.current = next; setState(next); };

  const reload = useCallback(async () => {
    const snapshotBefore = latest.current;
    try {
      const [{ jobs, hasMore }, snapshot] = await Promise.all([readPages(pages.current), read("/v1/queue")]);
      announceChanges(held.current.jobs, jobs);
      const found = { jobs, queue: byId(snapshot), hasMore, error: null, loading: false, readAt: Date.now() };
      put(latest.current === snapshotBefore ? found : withProgress(found, latest.current)); // the stream's snapshot is newer than the one that was read
    } catch (error) {
      put({ ...held.current, error, loading: false });
    }
  }, []);

  useEffect(() => {
    const soon = throttle(reload, RELOAD_MS);
    soon();
    const moved = (snapshot) => {
      latest.current = snapshot;
      if (Date.now() - held.current.readAt > OLDEST_MS || isOutdated(held.current, snapshot)) soon();
      else put(withProgress(held.current, snapshot));
    };
    const close = listen(QUEUE, { queue: moved }, soon);
    return () => { soon.cancel(); close(); };
  }, []);

  const more = () => { pages.current += 1; return reload(); };
  return { ...state, curves: useCurves(state.jobs), reload, more };
}

/** Run `reload` now, whenever the stream at `path` has a new snapshot (at most once per second), and at each reconnection. */
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

/** Whether the snapshot has a new, finished or changed job that the list does not show. */
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

function announceChanges(before, after) {
  const states = new Map(before.map((job) => [job.id, job.status]));
  const moved = after.filter((job) => states.has(job.id) && states.get(job.id) !== job.status);
  if (moved.length) announce(moved.map((job) => `${jobName(job)} is ${stateWord(job.status)}`).join(". "));
}
