// Points of the sparklines: each job's training curve is read once, and later points of a running job are appended.
import { useEffect, useRef, useState } from "./html.js";
import { query, read } from "./api.js";

const POINTS = 60;

/** Points {step, loss} by the id of each job that has trained. */
export function useCurves(jobs) {
  const [curves, setCurves] = useState({});
  const asked = useRef(new Set());
  useEffect(() => {
    for (const job of jobs.filter((job) => hasTrained(job) && !asked.current.has(job.id))) {
      asked.current.add(job.id);
      read(`/v1/fine_tuning/jobs/${job.id}/metrics${query({ kind: "train", max_points: POINTS })}`)
        .then(({ data }) => setCurves((was) => ({ ...was, [job.id]: data })))
        .catch(() => asked.current.delete(job.id));
    }
    setCurves((was) => jobs.reduce(withLatest, was));
  }, [jobs]);
  return curves;
}

const hasTrained = (job) => job.progress?.step > 0 || job.status === "succeeded";

/** The curves with the job's latest point. If a resumed job repeats a step, later points are dropped. */
function withLatest(curves, job) {
  const points = curves[job.id];
  const { step, loss } = job.progress || {};
  if (job.status !== "running" || !points || !Number.isFinite(loss) || points.at(-1)?.step === step) return curves;
  return { ...curves, [job.id]: [...points.filter((point) => point.step < step), { step, loss }] };
}
