// Deletion of an entry of a list, with a confirmation. An error is shown until the next attempt.
import { html, useState } from "../html.js";
import { send } from "../api.js";
import { announce } from "./announce.js";
import { confirm } from "./confirm.js";

/** {error, busy (the id that is being deleted), run}; `done` reloads the list. */
export function useDeletion(path, done) {
  const [state, setState] = useState({ error: null, busy: null });
  const run = async (id, name, question) => {
    if (state.busy || !(await confirm(question))) return;
    setState({ error: null, busy: id });
    try {
      await send("DELETE", `${path}/${encodeURIComponent(id)}`);
      announce(`Deleted ${name}`);
      await done();
      setState({ error: null, busy: null });
      // The button that had the focus no longer exists.
      document.querySelector("main h1")?.focus();
    } catch (error) {
      setState({ error, busy: null });
    }
  };
  return { ...state, run };
}

/** The button is never disabled, because a disabled button loses the focus. */
export function Delete({ deletion, id, name, what, text }) {
  const question = { title: `Delete ${name}?`, text, yes: `Delete the ${what}`, no: `Keep the ${what}`, danger: true };
  return html`<button type="button" class="danger-quiet" aria-disabled=${deletion.busy === id ? "true" : null} onClick=${() => deletion.run(id, name, question)}>
    Delete<span class="unseen"> ${name}</span></button>`;
}
