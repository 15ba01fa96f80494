// The frame of every page: logo, navigation, state of the live connection, theme, sign-out.
import { html } from "../html.js";
import { link } from "../router.js";
import { connection } from "../live.js";
import { nextTheme, theme } from "../theme.js";
import { browserSession, send, signedIn } from "../api.js";
import { useStore } from "../store.js";
import { Announcer } from "./announce.js";
import { Confirmer } from "./confirm.js";

const PLACES = [["jobs", "Jobs"], ["queue", "Queue"], ["adapters", "Adapters"], ["models", "Models"], ["files", "Files"], ["workers", "Workers"]];

export function Frame({ page, children }) {
  const isIn = useStore(signedIn);
  const session = useStore(browserSession);
  const skip = (event) => { event.preventDefault(); document.querySelector("main h1")?.focus(); };
  return html`
    <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <header class="top">
      <a class="brand" href=${link.jobs()} aria-label="Lorry, jobs"><${Mark} /><span aria-hidden="true">Lorry</span></a>
      ${isIn && html`<nav aria-label="Main"><ul>${PLACES.map(([key, name]) => html`
        <li key=${key}><a href=${link[key]()} aria-current=${page === key ? "page" : null}>${name}</a></li>`)}</ul></nav>`}
      <div class="tools">
        ${isIn && html`<${Connection} />`}
        ${isIn && session && html`<span class="who" title=${`Signed in with the ${session.is_operator ? "operator key" : "key"} “${session.key_name}”`}><span class="unseen">Project </span>${session.project}</span>`}
        <${ThemeButton} />
        ${isIn && html`<button type="button" class="quiet" onClick=${signOut}>Sign out</button>`}
      </div>
    </header>
    <main id="main">${children}</main>
    <${Announcer} /><${Confirmer} />`;
}

export const Mark = () => html`<svg class="mark" viewBox="0 0 32 24" aria-hidden="true"><use href="lorry.svg#lorry" /></svg>`;

const CONNECTION = {
  live: ["Live", "The page updates automatically."],
  connecting: ["Connecting", "Connecting for live updates."],
  lost: ["Reconnecting", "The live connection was lost and is being reopened. The page may be out of date."],
};

function Connection() {
  const state = useStore(connection);
  if (!CONNECTION[state]) return null;
  const [word, title] = CONNECTION[state];
  return html`<span class=${`connection connection-${state}`} role="status" title=${title}><span class="dot" aria-hidden="true"></span><span class="connection-word">${word}</span></span>`;
}

function ThemeButton() {
  const now = useStore(theme);
  return html`<button type="button" class="quiet" onClick=${nextTheme} aria-label=${`Colors: ${now}. Change.`} title="Colors: system, light or dark">
    <svg class="theme-sign" viewBox="0 0 16 16" aria-hidden="true"><circle cx="8" cy="8" r="6.25" fill="none" stroke="currentColor" stroke-width="1.5" />
      ${now === "dark" ? html`<circle cx="8" cy="8" r="6" fill="currentColor" />` : now === "system" ? html`<path d="M8 2a6 6 0 0 1 0 12z" fill="currentColor" />` : null}</svg></button>`;
}

async function signOut() {
  await send("DELETE", "/v1/browser_session").catch(() => {});
  signedIn.set(false);
}
