// The list of base models: state, import error, adapters and jobs. Operators can delete a base model.
import { html, useEffect } from "../html.js";
import { browserSession, query } from "../api.js";
import { link } from "../router.js";
import { useStore } from "../store.js";
import { useLive } from "../jobs_data.js";
import { useResource } from "../resource.js";
import { Ago, Empty, Failure, Id, Loading } from "../parts/basics.js";
import { Delete, useDeletion } from "../parts/deletion.js";
import * as format from "../format.js";

const READ_MS = 3000;
const STATES = { importing: "importing", ready: "ready", failed: "import failed" };

export function ModelsPage() {
  const reader = useStore(browserSession);
  return html`
    <div class="title"><h1 tabindex="-1">Models</h1></div>
    <p class="lead">Base models that jobs can train on. Trained adapters are listed under <a href=${link.adapters()}>Adapters</a>.</p>
    ${reader ? html`<${Models} key=${reader.is_operator} isOperator=${reader.is_operator} />` : html`<${Loading} />`}`;
}

/** Operators can delete base models, so they see the jobs of all projects. Other users see only those of their project. */
function Models({ isOperator }) {
  const scope = query({ all: isOperator || null });
  const { data, error, loading, reload } = useResource("/v1/models");
  const { data: queue, reload: reloadQueue } = useResource(`/v1/queue${scope}`);
  const deletion = useDeletion("/v1/models", reload);
  useLive(() => { reload(); reloadQueue(); }, `/v1/queue/stream${scope}`);
  const models = data?.data || [];
  const bases = models.filter((model) => model.kind === "base");
  useWhile(bases.some((base) => base.state === "importing"), reload);
  return html`
    ${error && html`<${Failure} error=${error} retry=${reload} />`}
    ${deletion.error && html`<${Failure} error=${deletion.error} />`}
    ${loading ? html`<${Loading} />` : bases.length
      ? html`<${ModelsTable} bases=${bases} models=${models} jobs=${queue?.jobs} isOperator=${isOperator} deletion=${deletion} />`
      : !error && html`<${Empty} title="No base model yet." command="lorry models add NAME SOURCE">SOURCE is a Hub id, a folder with safetensors files, or a GGUF file. Only an operator key can add base models.<//>`}`;
}

/** Polls while an import runs, because no stream has an event for its end. */
function useWhile(isOn, reload) {
  useEffect(() => {
    if (!isOn) return undefined;
    const timer = setInterval(() => { if (!document.hidden) reload(); }, READ_MS);
    return () => clearInterval(timer);
  }, [isOn]);
}

const COLUMNS = ["Model", "State", "Parameters", "Used by"];

function ModelsTable({ bases, models, jobs, isOperator, deletion }) {
  return html`<table class="table cards models" role="table"><caption class="unseen">Base models by name</caption>
    <thead role="rowgroup"><tr role="row">${COLUMNS.map((name) => html`<th role="columnheader" scope="col" key=${name}>${name}</th>`)}
      ${isOperator && html`<th role="columnheader" scope="col"><span class="unseen">Delete</span></th>`}</tr></thead>
    <tbody role="rowgroup">${bases.map((base) => html`<${Row} key=${base.id} base=${base} isOperator=${isOperator} deletion=${deletion}
      adapters=${models.filter((model) => model.kind === "adapter" && model.base === base.id).length}
      unfinished=${jobs?.filter((job) => job.base_model === base.id).length} />`)}</tbody></table>`;
}

/** Text about unfinished jobs; `unfinished` is undefined until the queue was read. */
function use(unfinished, isOperator) {
  const whose = isOperator ? "" : " of this project";
  if (unfinished === undefined) return "";
  return unfinished ? `${format.plural(unfinished, "unfinished job")}${whose}` : `no unfinished jobs${whose}`;
}

function Row({ base, adapters, unfinished, isOperator, deletion }) {
  const { num_parameters, dtype, max_positions } = base.description || {};
  const source = [base.source, base.revision && `at ${format.short(base.revision, 12)}`].filter(Boolean).join(" ");
  return html`<tr role="row">
    <th role="rowheader" scope="row" class="model-name"><b>${base.id}</b>
      <span class="sub">${source && html`<span class="source">${source}</span>`}<span>added <${Ago} at=${base.created} /></span></span>
      ${base.digest && html`<${Id} id=${base.digest} what=${`digest of ${base.id}`} length=${16} />`}</th>
    <td role="cell" class="model-state"><span class=${`state model-${base.state}`}><span class="dot" aria-hidden="true"></span>${STATES[base.state] || base.state}</span>
      ${base.error && html`<span class="why-failed"><b>${base.error.message}</b> ${base.error.remedy}</span>`}</td>
    <td role="cell">${typeof num_parameters === "number" && html`<span class="narrow-only soft">Parameters </span>${format.compact(num_parameters)}
      <span class="sub">${dtype && html`<span>${dtype}</span>`}${max_positions && html`<span>up to ${format.count(max_positions)} tokens</span>`}</span>`}</td>
    <td role="cell">${format.plural(adapters, "adapter")} of this project<span class="sub">${use(unfinished, isOperator)}</span></td>
    ${isOperator && html`<td role="cell" class="act-cell"><${Delete} deletion=${deletion} id=${base.id} name=${base.id} what="model"
      text="No more jobs can train on it, and its name can be used again. Its adapters stay. Workers remove its files from their disks within about an hour." /></td>`}
  </tr>`;
}
