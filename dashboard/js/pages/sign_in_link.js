// A one-time link: shows the project and the key that it signs in to, and uses the link only when the user confirms.
import { html, useEffect, useState } from "../html.js";
import { browserSession, send, signedIn } from "../api.js";
import { link } from "../router.js";
import { useStore } from "../store.js";
import { Failure, Loading } from "../parts/basics.js";
import { Mark } from "../parts/frame.js";

export function SignInLinkPage({ token }) {
  const isIn = useStore(signedIn);
  const session = useStore(browserSession);
  const [target, setTarget] = useState(null);
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  useEffect(() => {
    send("POST", "/v1/sign_in_links/preview", { token }).then(setTarget, setError);
  }, [token]);
  const current = isIn ? session : null;
  const open = async () => {
    setBusy(true);
    setError(null);
    try {
      await send("POST", "/v1/sign_in_links/open", { token, replaces_session: current !== null });
    } catch (problem) {
      setError(problem);
      setBusy(false);
      return;
    }
    // Removes the used token from the history, and all data of an earlier session from the page.
    history.replaceState(null, "", link.jobs());
    location.reload();
  };
  return html`<div class="sign-in">
    <${Mark} />
    <h1 tabindex="-1">Sign in to Lorry</h1>
    ${error && html`<${Failure} error=${error} />`}
    ${!target && !error && html`<${Loading} />`}
    ${target && html`
      <p>This link signs this browser in to the project <strong>${target.project}</strong> with the key <strong>${target.key_name}</strong>${target.is_operator ? ", an operator key" : ""}.</p>
      ${current && html`<p class="warning" role="note">You are signed in to the project <strong>${current.project}</strong> with the key <strong>${current.key_name}</strong>. That session will end.</p>`}
      <p class="soft">Continue only if you created this link or trust its sender. Files that you upload afterwards belong to this project.</p>
      <p class="buttons"><button type="button" class="primary" disabled=${busy} onClick=${open}>${busy ? "Signing in…" : current ? `Switch to ${target.project}` : `Sign in to ${target.project}`}</button></p>`}
    ${(current || !target) && html`<p><a href=${link.jobs()}>${current ? `Stay in ${current.project}` : "Sign in with an API key"}</a></p>`}
  </div>`;
}
