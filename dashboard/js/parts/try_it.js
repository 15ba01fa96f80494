// A panel that asks an adapter and its base model the same question, and shows both answers while they grow.
import { html, useEffect, useRef, useState } from "../html.js";
import { streamAnswer } from "../api.js";
import { announce } from "./announce.js";
import { Failure, Panel } from "./basics.js";

const MAX_TOKENS = 300;
const NOTHING = { text: "", error: null, busy: false };

export function TryIt({ adapter }) {
  const [tuned, setTuned] = useState(NOTHING);
  const [base, setBase] = useState(NOTHING);
  const question = useRef(null);
  const leaving = useRef(new AbortController());
  useEffect(() => () => leaving.current.abort(), []);
  const busy = tuned.busy || base.busy;
  const submit = async (event) => {
    event.preventDefault();
    const content = question.current.value.trim();
    if (busy) return;
    if (!content) return question.current.focus();
    await Promise.all([ask(adapter.name, content, setTuned, leaving.current.signal), ask(adapter.base_model, content, setBase, leaving.current.signal)]);
    if (!leaving.current.signal.aborted) announce("The models have finished");
  };
  return html`<${Panel} title="Try it" id="try-it">
    <form class="ask" onSubmit=${submit}>
      <label for="question">Message</label>
      <textarea id="question" ref=${question} rows="2"></textarea>
      <button type="submit" class="primary" aria-disabled=${busy ? "true" : null}>${busy ? "Answering…" : "Send"}</button>
    </form>
    <div class="answers"><${Answer} title="This adapter" answer=${tuned} /><${Answer} title="Base model" answer=${base} /></div>
  <//>`;
}

async function ask(model, content, set, signal) {
  let text = "";
  set({ ...NOTHING, busy: true });
  try {
    const body = { model, messages: [{ role: "user", content }], temperature: 0, max_completion_tokens: MAX_TOKENS };
    await streamAnswer(body, (piece) => { text += piece; set({ text, error: null, busy: true }); }, signal);
    set({ text, error: null, busy: false });
  } catch (error) {
    set({ text, error, busy: false });
  }
}

function Answer({ title, answer: { text, error, busy } }) {
  if (!text && !error && !busy) return null;
  return html`<section class="answer" aria-busy=${busy ? "true" : "false"}><h3>${title}</h3>
    ${text ? html`<p class="answer-text">${text}</p>` : busy && html`<p class="soft">Waiting for the model…</p>`}
    ${error && html`<${Failure} error=${error} />`}</section>`;
}
