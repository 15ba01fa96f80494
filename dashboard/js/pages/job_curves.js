// The curves of a job: a large chart of the training and validation loss, and small charts of other metrics.
import { html, useMemo } from "../html.js";
import { Chart } from "../parts/chart.js";
import { FINAL, Panel } from "../parts/basics.js";
import * as format from "../format.js";

const SMOOTH_FROM = 30;

export function Curves({ train, valid, job }) {
  const losses = useMemo(() => lossSeries(train, valid), [train, valid]);
  const extras = useMemo(() => extraSeries(train, valid), [train, valid]);
  return html`<${Panel} title="Loss" id="curves">
    ${train.length + valid.length === 0
      ? html`<p class="soft pad">${FINAL.has(job.status) ? "The job ended before its first step." : "The first point appears after the first step."}</p>`
      : html`<${Chart} ...${lossOf(job)} height=${280} series=${losses} summary=${summary(train, valid)} />
        <div class="small-charts">${extras.map((one) => html`<${Chart} key=${one.title} ...${one} height=${120} />`)}</div>`}
  <//>`;
}

/** Title and unit of the loss, which depend on the method. */
function lossOf(job) {
  const { type = "supervised" } = job.method || {};
  if (type === "supervised") return { title: "Cross-entropy", unit: "nats per trained token, by step" };
  return { title: `${type.toUpperCase()} loss`, unit: `mean over ${type === "kto" ? "answers" : "pairs of answers"}, by step` };
}

const points = (curve, field) => curve.filter((point) => Number.isFinite(point[field])).map((point) => ({ x: point.step, y: point[field] }));

function lossSeries(train, valid) {
  const raw = points(train, "loss");
  const series = raw.length < SMOOTH_FROM
    ? [{ name: "train", color: "--train", points: raw, format: format.loss }]
    : [{ name: "train", color: "--train", points: raw, thin: true, format: format.loss },
       { name: "smoothed", color: "--train", points: smooth(raw), format: format.loss }];
  if (valid.length) series.push({ name: "validation", color: "--valid", points: points(valid, "loss"), marked: true, format: format.loss });
  return series;
}

/** An exponential moving average over about a fiftieth of the curve, without bias toward its first value. */
function smooth(raw) {
  const keep = 1 - 1 / Math.max(5, raw.length / 50);
  let mean = 0;
  let weight = 0;
  return raw.map(({ x, y }) => {
    mean = keep * mean + (1 - keep) * y;
    weight = keep * weight + (1 - keep);
    return { x, y: mean / weight };
  });
}

function extraSeries(train, valid) {
  const accuracy = [
    { name: "train", color: "--train", points: points(train, "token_accuracy"), format: (value) => format.percent(value, 1) },
    { name: "validation", color: "--valid", points: points(valid, "token_accuracy"), marked: true, format: (value) => format.percent(value, 1) },
  ];
  const one = (title, field, unit) => ({ title, unit, series: [{ name: "train", color: "--train", points: points(train, field), format: format.power }] });
  const all = [...rewardSeries(train, valid), { title: "Token accuracy", series: accuracy.filter((series) => series.points.length) }, one("Learning rate", "learning_rate"), one("Gradient norm", "grad_norm", "before clipping")];
  return all.filter(({ series }) => series.some((curve) => curve.points.length > 1))
    .map((chart) => ({ smallest: 0, ...chart, summary: `${chart.title} by step. ${chart.series.map(ends).join(" ")}` }));
}

/** Charts of a job with rewards, from pairs or from labeled answers, which alone have `kl`. Rewards may be negative. */
function rewardSeries(train, valid) {
  const of = (curve, field) => curve.filter(({ rewards }) => Number.isFinite(rewards?.[field])).map(({ step, rewards }) => ({ x: step, y: rewards[field] }));
  const one = (title, field, text, smallest) => ({ title, smallest, series: [
    { name: "train", color: "--train", points: of(train, field), format: text },
    { name: "validation", color: "--valid", points: of(valid, field), marked: true, format: text },
  ].filter((series) => series.points.length) });
  const byLabel = train.some(({ rewards }) => Number.isFinite(rewards?.kl));
  const sides = { title: "Rewards", unit: byLabel ? "on training answers" : "on training pairs", smallest: undefined, series: [
    { name: byLabel ? "desirable" : "preferred", color: "--train", points: of(train, "chosen"), format: format.power },
    { name: byLabel ? "undesirable" : "rejected", color: "--valid", points: of(train, "rejected"), format: format.power },
  ] };
  return [one("Reward accuracy", "accuracy", (value) => format.percent(value, 1), 0), one("Reward margin", "margin", format.power, undefined), sides];
}

const ends = ({ name, points: curve, format: text }) => (curve.length ? `${name}: from ${text(curve[0].y)} to ${text(curve.at(-1).y)}.` : "");

function summary(train, valid) {
  const parts = [["Training", train], ["Validation", valid]].filter(([, curve]) => curve.length);
  return parts.map(([name, curve]) => `${name} loss went from ${format.loss(curve[0].loss)} at step ${curve[0].step} to ${format.loss(curve.at(-1).loss)} at step ${curve.at(-1).step}.`).join(" ");
}
