// The list of the project's adapters: the change of the validation loss, and the verification.
import { html, useCallback, useState } from "../html.js";
import { query, read } from "../api.js";
import { link } from "../router.js";
import { useLive } from "../jobs_data.js";
import { Ago, Empty, Failure, Loading } from "../parts/basics.js";
import { Gain, Verified, adapterLabel, archivePath } from "../parts/adapter_facts.js";
import * as format from "../format.js";

const PAGE = 50;

export function AdaptersPage() {
  const [state, setState] = useState({ adapters: [], hasMore: false, loading: true, error: null });
  const load = useCallback(async () => {
    try {
      const page = await read(`/v1/adapters${query({ limit: PAGE })}`);
      setState((was) => ({ adapters: merged(page.data, was.adapters), hasMore: was.adapters.length > PAGE ? was.hasMore : page.has_more, loading: false, error: null }));
    } catch (error) {
      setState((was) => ({ ...was, loading: false, error }));
    }
  }, []);
  useLive(load);
  const more = async () => {
    const page = await read(`/v1/adapters${query({ limit: PAGE, after: state.adapters.at(-1).id })}`);
    setState((was) => ({ ...was, adapters: [...was.adapters, ...page.data], hasMore: page.has_more }));
  };
  const { adapters, loading, error, hasMore } = state;
  return html`
    <div class="title"><h1 tabindex="-1">Adapters</h1></div>
    ${error && html`<${Failure} error=${error} retry=${load} />`}
    ${loading ? html`<${Loading} />` : adapters.length ? html`<${AdaptersTable} adapters=${adapters} />` : !error && html`
      <${Empty} title="No adapters yet." command="lorry jobs submit MODEL train.jsonl">Each job that succeeds creates an adapter.<//>`}
    ${hasMore && html`<p class="more"><button type="button" onClick=${more}>Show older adapters</button></p>`}`;
}

/** The new first page, with the older adapters that were on the screen. */
function merged(fresh, before) {
  if (before.length <= PAGE) return fresh;
  const ids = new Set(fresh.map((adapter) => adapter.id));
  return [...fresh, ...before.filter((adapter) => !ids.has(adapter.id))];
}

function AdaptersTable({ adapters }) {
  return html`<table class="table cards adapters" role="table">
    <caption class="unseen">Adapters, newest first</caption>
    <thead role="rowgroup"><tr role="row">${["Adapter", "Validation loss", "Verified", "Size", "Archive"].map((name) => html`<th role="columnheader" scope="col" key=${name}>${name}</th>`)}</tr></thead>
    <tbody role="rowgroup">${adapters.map((adapter) => html`<tr role="row" key=${adapter.id}>
      <th role="rowheader" scope="row"><a href=${link.adapter(adapter.id)}>${adapterLabel(adapter)}</a>
        <span class="sub"><span>${adapter.base_model}</span><span>rank ${adapter.rank ?? format.UNKNOWN}</span><span><${Ago} at=${adapter.created_at} /></span></span></th>
      <td role="cell"><${Gain} evaluation=${adapter.evaluation} /></td>
      <td role="cell"><${Verified} verification=${adapter.verification} /></td>
      <td role="cell">${format.bytes(adapter.bytes)}<span class="sub">${format.compact(adapter.num_parameters)} parameters</span></td>
      <td role="cell"><a class="button" href=${archivePath(adapter)} download>Download<span class="unseen"> ${adapterLabel(adapter)}</span></a></td>
    </tr>`)}</tbody>
  </table>`;
}
