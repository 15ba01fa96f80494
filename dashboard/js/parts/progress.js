// The progress of a job and its loss: a progress bar and a sparkline.
import { html } from "../html.js";
import * as format from "../format.js";

/** Fraction of the job that is done, 0 to 1; null while its number of steps is not known. */
export function done(job) {
  if (job.status === "succeeded") return 1;
  const total = numSteps(job);
  return total && job.progress ? Math.min(1, (job.progress.step || 0) / total) : null;
}

export const numSteps = (job) => job.progress?.num_steps ?? job.num_steps;

/**
 * Passes over the data: {done, total}. `rows` is the number of usable rows. If it is not known and max_steps may have
 * ended the job before its last pass, the total is not known either: null.
 */
export function epochs(job, rows) {
  const total = numSteps(job);
  const { n_epochs, batch_size } = job.hyperparameters;
  if (!total || (!rows && total === job.max_steps)) return null;
  const all = rows ? Math.min(n_epochs, (total * batch_size) / rows) : n_epochs;
  return { done: reportedEpoch(job) ?? (all * (job.progress?.step ?? 0)) / total, total: all };
}

/** Passes done; undefined if not known. */
export const epochDone = (job) => reportedEpoch(job) ?? epochs(job)?.done;

/** Passes done as the worker reports them, limited to n_epochs: the last batch may exceed the last pass. */
const reportedEpoch = ({ progress, hyperparameters }) => (typeof progress?.epoch === "number" ? Math.min(progress.epoch, hyperparameters.n_epochs) : undefined);

/** A number of passes as text: 3, or 0.50 if max_steps ends the job in the middle of a pass. */
export const passes = (number) => (Number.isInteger(number) ? String(number) : number.toFixed(2));

export function Bar({ job, label }) {
  const part = done(job);
  if (part === null) return null;
  return html`<progress class=${`bar bar-${job.status}`} max="1" value=${part} aria-label=${label || `Progress of ${jobName(job)}`}>${format.percent(part)}</progress>`;
}

/** Explanation of a job's duration. */
export const TOOK = "Time on workers in all attempts, without waiting and pauses.";

/** The name of a job: its suffix, else its id. */
export const jobName = (job) => job.suffix || job.id;

const WIDTH = 96;
const HEIGHT = 24;

/** The curve of [{step, loss}] as a line without axes, scaled to its own range. */
export function Sparkline({ points, label = "training loss" }) {
  const losses = (points || []).filter((point) => Number.isFinite(point.loss));
  if (losses.length < 2) return html`<span class="spark spark-none" aria-hidden="true"></span>`;
  const first = losses[0].loss;
  const last = losses.at(-1).loss;
  const low = Math.min(...losses.map((point) => point.loss));
  const high = Math.max(...losses.map((point) => point.loss));
  const from = losses[0].step;
  const span = losses.at(-1).step - from || 1;
  const x = (point) => 2 + ((point.step - from) / span) * (WIDTH - 6);
  const y = (point) => 2 + ((high - point.loss) / (high - low || 1)) * (HEIGHT - 4);
  const text = `${label} from ${format.loss(first)} to ${format.loss(last)} over ${format.plural(losses.at(-1).step, "step")}`;
  return html`
    <svg class="spark" viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} width=${WIDTH} height=${HEIGHT} role="img" aria-label=${text}>
      <polyline points=${losses.map((point) => `${x(point).toFixed(1)},${y(point).toFixed(1)}`).join(" ")} />
      <circle cx=${x(losses.at(-1)).toFixed(1)} cy=${y(losses.at(-1)).toFixed(1)} r="2" />
    </svg>`;
}
