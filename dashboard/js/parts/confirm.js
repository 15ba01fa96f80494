// A confirmation before an action. The native dialog traps the focus, and restores it afterwards.
import { html, useLayoutEffect, useRef } from "../html.js";
import { createStore, useStore } from "../store.js";

const asked = createStore(null);

/** Ask the user: {title, text, yes, no, danger}. Resolves to true if the user confirms. */
export const confirm = (question) => new Promise((resolve) => asked.set({ ...question, resolve }));

export function Confirmer() {
  const question = useStore(asked);
  const dialog = useRef(null);
  useLayoutEffect(() => {
    if (question && !dialog.current.open) dialog.current.showModal();
  }, [question]);
  if (!question) return null;
  const answer = (value) => {
    dialog.current.close();
    asked.set(null);
    question.resolve(value);
  };
  return html`
    <dialog ref=${dialog} class="confirm" aria-labelledby="confirm-title" aria-describedby="confirm-text"
      onCancel=${(event) => { event.preventDefault(); answer(false); }}>
      <h2 id="confirm-title">${question.title}</h2>
      <p id="confirm-text">${question.text}</p>
      <div class="buttons">
        <button type="button" onClick=${() => answer(false)} autofocus>${question.no}</button>
        <button type="button" class=${question.danger ? "danger" : "primary"} onClick=${() => answer(true)}>${question.yes}</button>
      </div>
    </dialog>`;
}
