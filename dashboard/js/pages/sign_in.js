// Sign-in with an API key. The key is sent to the API once, which sets a session cookie that scripts can't read.
import { html, useRef, useState } from "../html.js";
import { browserSession, send, signedIn } from "../api.js";
import { Command } from "../parts/basics.js";
import { Mark } from "../parts/frame.js";

export function SignInPage() {
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const field = useRef(null);
  const submit = async (event) => {
    event.preventDefault();
    const key = field.current.value.trim();
    if (!key) {
      setError({ message: "The API key is missing.", remedy: "Paste an API key into the field." });
      return field.current.focus();
    }
    setBusy(true);
    setError(null);
    try {
      browserSession.set(await send("POST", "/v1/browser_session", { api_key: key }));
      signedIn.set(true);
    } catch (problem) {
      setError(problem);
      setBusy(false);
      field.current.focus();
    }
  };
  return html`<div class="sign-in">
    <${Mark} />
    <h1 tabindex="-1">Sign in to Lorry</h1>
    <form onSubmit=${submit} novalidate>
      <label for="key">API key</label>
      <input id="key" ref=${field} type="password" autocomplete="off" spellcheck="false" placeholder="lorry_key-…" aria-invalid=${error ? "true" : null} aria-describedby=${error ? "key-error" : null} />
      <p id="key-error" class="field-error" role="alert">${error && html`${error.message} ${error.remedy || ""}`}</p>
      <button type="submit" class="primary" disabled=${busy}>${busy ? "Signing in…" : "Sign in"}</button>
    </form>
    <p class="soft">Or create a one-time link on the machine that runs Lorry:</p>
    <${Command} text="lorry sign-in-link" />
  </div>`;
}
