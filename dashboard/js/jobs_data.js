// The list of jobs as a page holds it: read by pages of the API, read again when the queue says that something moved.
import { useCallback, useEffect, useRef, useState } from "./html.js";
import { query, read } from "./api.js";
import { listen, throttle } from "./live.js";
import { announce } from "./parts/announce.js";
import { FINAL, stateWord } from "./parts/basics.js";
import { jobName } from "./parts/progress.js";

const PAGE = 50;
const RELOAD_MS = 1000;
const SPARK_POINTS = 60;

/** {jobs, queue, hasMore, more, error, loading, curves, reload}; `queue` and `curves` map a job's id to its entry and points. */
export function useJobs() {
  const [state, setState] = useState({ jobs: [], queue: {}, hasMore: false, error: null, loading: true });
  const pages = useRef(1);
  const curves = useCurves(state.jobs);

  const reload = useCallback(async () => {
    try {
      const [{ jobs, hasMore }, queue] = await Promise.all([readPages(pages.current), read("/v1/queue")]);
      const entries = Object.fromEntries(queue.jobs.map((entry) => [entry.job_id, entry]));
      setState((was) => { tellChanges(was.jobs, jobs); return { jobs, queue: entries, hasMore, error: null, loading: false }; });
    } catch (error) {
      setState((was) => ({ ...was, error, loading: false }));
    }
  }, []);

  useLive("/v1/queue/stream", reload);
  const more = () => { pages.current += 1; return reload(); };
  return { ...state, curves, reload, more };
}

/** Run `reload` now, at every event of the stream (once a second at most) and at each reconnection. */
export function useLive(path, reload) {
  useEffect(() => {
    const soon = throttle(reload, RELOAD_MS);
    soon();
    const close = listen(path, { queue: soon, job: soon, message: soon }, soon);
    return () => { soon.cancel(); close(); };
  }, [path]);
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

function tellChanges(before, after) {
  const states = new Map(before.map((job) => [job.id, job.status]));
  const moved = after.filter((job) => states.has(job.id) && states.get(job.id) !== job.status);
  if (moved.length) announce(moved.map((job) => `${jobName(job)} is ${stateWord(job.status)}`).join(". "));
}

/** Points of every job that has trained. A finished job's are read once; a running one's when its step has moved. */
function useCurves(jobs) {
  const [curves, setCurves] = useState({});
  const read_at = useRef(new Map());
  useEffect(() => {
    const due = jobs.filter((job) => isDue(job, read_at.current));
    due.forEach((job) => read_at.current.set(job.id, mark(job)));
    due.forEach(async (job) => {
      try {
        const { data } = await read(`/v1/fine_tuning/jobs/${job.id}/metrics${query({ kind: "train", max_points: SPARK_POINTS })}`);
        setCurves((was) => ({ ...was, [job.id]: data }));
      } catch {
        read_at.current.delete(job.id);
      }
    });
  }, [jobs]);
  return curves;
}

const mark = (job) => (FINAL.has(job.status) ? "final" : job.progress?.step);

function isDue(job, read_at) {
  const trained = job.progress?.step > 0 || job.status === "succeeded";
  return trained && read_at.get(job.id) !== mark(job);
}
