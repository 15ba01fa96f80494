// The serving endpoints of an adapter: state, last error and verification, read again while the state may change.
import { html, useEffect } from "../html.js";
import { useResource } from "../resource.js";
import { Ago, Command, Failure, Panel } from "./basics.js";
import * as format from "../format.js";

const POLL_SECONDS = 5;
const TONES = { ready: "good-text", failed: "bad-text" };

export function Deployments({ adapter, path }) {
  const { data, error, reload } = useResource(`${path}/deployments`);
  useEffect(() => {
    const timer = setInterval(reload, POLL_SECONDS * 1000);
    return () => clearInterval(timer);
  }, [reload]);
  const rows = data?.data || [];
  return html`<${Panel} title="Serving" id="serving">
    ${error && html`<${Failure} error=${error} retry=${reload} />`}
    ${data && rows.length === 0 && html`<p class="soft pad">The built-in engine answers requests to this adapter. For production, deploy it on a serving endpoint:</p>
      <${Command} text=${`lorry adapters deploy ${adapter.id} --to ENDPOINT`} />`}
    ${rows.length > 0 && html`<table class="table table-tight"><caption class="unseen">Serving endpoints of the adapter</caption>
      <thead><tr><th scope="col">Endpoint</th><th scope="col">State</th><th scope="col">Since</th></tr></thead>
      <tbody>${rows.map((row) => html`<tr key=${row.id}><th scope="row">${row.endpoint}</th>
        <td><span class=${TONES[row.state] || "soft"}>${row.state}</span>${note(row) && html`<span class="sub">${note(row)}</span>`}</td>
        <td><${Ago} at=${row.updated_at} /></td></tr>`)}</tbody></table>`}
  <//>`;
}

/** The last error, or else the result of the verification. */
function note({ last_error: error, verification }) {
  if (error || !verification) return error;
  const numbers = `log-probabilities differ by at most ${format.power(verification.max_diff)} (allowed: ${format.power(verification.tolerance)})`;
  return verification.distinguishes === false ? `${numbers}; the base model would pass too` : numbers;
}
