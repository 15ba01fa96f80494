// What a screen reader is told of: changes of state and results of actions, politely and one at a time.
import { createStore, useStore } from "../store.js";
import { html } from "../html.js";

const said = createStore({ text: "", turn: 0 });

export const announce = (text) => said.set({ text, turn: said.get().turn + 1 });

/** Two regions in turn, so that the same sentence twice is heard twice. */
export function Announcer() {
  const { text, turn } = useStore(said);
  return html`<div class="unseen" role="status" aria-live="polite">${turn % 2 ? text : ""}</div>
    <div class="unseen" role="status" aria-live="polite">${turn % 2 ? "" : text}</div>`;
}
