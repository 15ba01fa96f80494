// A question before something that can't be undone. The native dialog keeps the focus and gives it back.
import { html, useLayoutEffect, useRef } from "../html.js";
import { createStore, useStore } from "../store.js";

const asked = createStore(null);

/** true if the person agrees. {title, text, yes, no, danger} */
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
