// Announcements for screen readers: changes of state and results of actions, politely and one at a time.
import { createStore, useStore } from "../store.js";
import { html } from "../html.js";

const announcement = createStore({ text: "", turn: 0 });

export const announce = (text) => announcement.set({ text, turn: announcement.get().turn + 1 });

/** Two regions that alternate, so that a repeated sentence is announced again. */
export function Announcer() {
  const { text, turn } = useStore(announcement);
  return html`<div class="unseen" role="status" aria-live="polite">${turn % 2 ? text : ""}</div>
    <div class="unseen" role="status" aria-live="polite">${turn % 2 ? "" : text}</div>`;
}
