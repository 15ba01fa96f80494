// A uPlot chart in a figure, with a readout that follows the pointer and the values as a table.
import { html, useEffect, useLayoutEffect, useRef, useState } from "../html.js";
import uPlot from "../../vendor/uplot.js";
import { color, palette } from "../theme.js";
import { useStore } from "../store.js";
import * as format from "../format.js";

const FONT = "12px 'Plex Sans', system-ui, sans-serif";

/**
 * series: [{name, color (custom property), points: [{x, y}], marked?, thin?, format}]. The shared x axis is the step.
 * A marked series is dashed, with a dot at each point, so that it can be distinguished without its color.
 * summary: one sentence that describes the chart.
 */
export function Chart({ title, summary, series, height = 260, unit, smallest }) {
  const box = useRef(null);
  const plot = useRef(null);
  const [at, setAt] = useState(null);
  const colors = useStore(palette);
  const columns = joined(series);
  const shape = series.map((one) => `${one.name}${isDot(one) ? " dot" : ""}`).join("|");

  useLayoutEffect(() => {
    const chart = new uPlot(options(series, box.current.clientWidth, height, setAt, smallest), columns, box.current);
    plot.current = chart;
    const watcher = new ResizeObserver(([entry]) => chart.setSize({ width: Math.floor(entry.contentRect.width), height }));
    watcher.observe(box.current);
    return () => { watcher.disconnect(); chart.destroy(); plot.current = null; };
  }, [shape, colors, height]);

  useEffect(() => { plot.current?.setData(columns); }, [series]);

  return html`
    <figure class="chart">
      <figcaption>
        <span class="chart-title">${title}${unit && html` <span class="soft">${unit}</span>`}</span>
        <${Readout} series=${series} columns=${columns} at=${at} />
      </figcaption>
      <div class="plot" ref=${box} role="img" aria-label=${summary}></div>
      <${Numbers} title=${title} series=${series} columns=${columns} />
    </figure>`;
}

/** The values at the pointer, else the last value of each series. */
function Readout({ series, columns, at }) {
  const step = at === null || at >= columns[0].length ? null : columns[0][at];
  return html`<span class="readout">
    ${step !== null && html`<span class="soft">step ${format.count(step)}</span>`}
    ${series.map((one, index) => html`<span key=${one.name} class="key">
      <${Swatch} series=${one} />${one.name}
      <b>${one.format(step === null ? one.points.at(-1)?.y : nearest(columns[index + 1], at))}</b></span>`)}
  </span>`;
}

/** A sample of a series' line. */
const Swatch = ({ series: { color: name, thin, marked } }) => html`
  <svg class=${`swatch swatch-${name.slice(2)}${thin ? " swatch-thin" : ""}${marked ? " swatch-marked" : ""}`} viewBox="0 0 26 10" aria-hidden="true">
    <line x1="1" x2="25" y1="5" y2="5" />${marked && html`<circle cx="13" cy="5" r="4" />`}</svg>`;

const MOST_ROWS = 60;

function Numbers({ title, series, columns }) {
  const [open, setOpen] = useState(false);
  const every = Math.max(1, Math.ceil(columns[0].length / MOST_ROWS));
  const rows = columns[0].map((_, index) => index)
    .filter((index) => index % every === 0 || index === columns[0].length - 1 || series.some((one, at) => one.marked && columns[at + 1][index] !== null));
  return html`
    <details class="numbers" onToggle=${(event) => setOpen(event.currentTarget.open)}>
      <summary>Values as a table<span class="unseen">: ${title}</span></summary>
      ${open && html`<div class="scroll" tabindex="0" role="region" aria-label=${`${title}, values`}><table class="table table-tight">
        <caption class="unseen">${title} by step${every > 1 ? `, every ${every} steps` : ""}</caption>
        <thead><tr><th scope="col" class="num">step</th>${series.map((one) => html`<th scope="col" class="num" key=${one.name}>${one.name}</th>`)}</tr></thead>
        <tbody>${rows.map((index) => html`<tr key=${index}><th scope="row" class="num">${format.count(columns[0][index])}</th>
          ${series.map((one, at) => html`<td class="num" key=${one.name}>${one.format(columns[at + 1][index])}</td>`)}</tr>`)}</tbody>
      </table></div>`}
    </details>`;
}

/** Columns for uPlot: all steps, then the values of each series, with null where it has no point. */
function joined(series) {
  const steps = [...new Set(series.flatMap((one) => one.points.map((point) => point.x)))].sort((a, b) => a - b);
  const columns = series.map((one) => {
    const values = new Map(one.points.map((point) => [point.x, point.y]));
    return steps.map((step) => values.get(step) ?? null);
  });
  return [steps, ...columns];
}

function nearest(column, at) {
  for (let index = at; index >= 0; index -= 1) if (column[index] !== null) return column[index];
  return null;
}

function options(series, width, height, onPoint, smallest) {
  const soft = color("--soft");
  const line = { stroke: color("--grid"), width: 1 };
  const axis = { stroke: soft, font: FONT, grid: line, ticks: { show: false } };
  return {
    width, height, legend: { show: false }, padding: [12, 18, 0, 0],
    cursor: { points: { size: 7 }, drag: { x: true, y: false } },
    scales: { x: { time: false }, y: { range: (_, low, high) => spread(low, high, smallest) } },
    axes: [
      { ...axis, size: 28, gap: 4, values: (_, steps) => steps.map((step) => (Number.isInteger(step) ? format.count(step) : "")) },
      { ...axis, size: roomFor, gap: 6, values: (_, values) => values.map((value) => format.power(value)) },
    ],
    series: [{}, ...series.map((one) => drawn(one))],
    hooks: { setCursor: [(chart) => onPoint(chart.cursor.idx ?? null)] },
  };
}

const LEAST_ROOM = 58;

/** Width of the axis labels, which are drawn on the canvas: that of the widest label, and the gaps. */
function roomFor(chart, labels, index, cycle) {
  if (cycle > 1) return chart.axes[index]._size; // uPlot calls this again until its layout is stable
  chart.ctx.font = chart.axes[index].font[0];
  const widths = (labels || []).map((label) => chart.ctx.measureText(label).width / devicePixelRatio);
  return Math.ceil(Math.max(LEAST_ROOM, ...widths.map((width) => width + 2 * chart.axes[index].gap)));
}

const DASH = [6, 4];

/** A single point is drawn as a dot, because it has no line. */
const isDot = (one) => one.points.length === 1;

function drawn(one) {
  const stroke = color(one.color);
  return {
    stroke, width: one.thin ? 1 : 2, alpha: one.thin ? 0.45 : 1, spanGaps: true, dash: one.marked ? DASH : [],
    points: one.marked || isDot(one) ? { show: true, size: 7, fill: stroke, stroke } : { show: false },
  };
}

function spread(low, high, smallest) {
  if (low === null || high === null) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [smallest === undefined ? low - room : Math.max(smallest, low - room), high + room];
}
