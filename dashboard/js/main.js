// Starts the dashboard: shows the page of the URL's hash, or the sign-in page if the user is not signed in.
import { html, render, useEffect, useRef } from "./html.js";
import { ApiError, browserSession, read, signedIn } from "./api.js";
import { route } from "./router.js";
import { createStore, useStore } from "./store.js";
import { Frame } from "./parts/frame.js";
import { Failure, Loading } from "./parts/basics.js";
import { JobsPage } from "./pages/jobs.js";
import { JobPage } from "./pages/job.js";
import { AdaptersPage } from "./pages/adapters.js";
import { AdapterPage } from "./pages/adapter.js";
import { FilesPage } from "./pages/files.js";
import { ModelsPage } from "./pages/models.js";
import { QueuePage } from "./pages/queue.js";
import { WorkersPage } from "./pages/workers.js";
import { SignInPage } from "./pages/sign_in.js";
import { SignInLinkPage } from "./pages/sign_in_link.js";

const PAGES = {
  jobs: { title: "Jobs", list: JobsPage, one: JobPage },
  adapters: { title: "Adapters", list: AdaptersPage, one: AdapterPage },
  queue: { title: "Queue", list: QueuePage },
  models: { title: "Models", list: ModelsPage },
  files: { title: "Files", list: FilesPage },
  workers: { title: "Workers", list: WorkersPage },
};
const problem = createStore(null);

function App() {
  const isIn = useStore(signedIn);
  const { page, id } = useStore(route);
  const error = useStore(problem);
  const place = PAGES[page];
  const opensLink = page === "sign-in" && id !== null;
  useArrival(isIn === null ? null : `${isIn}/${page}/${id}`, isIn === false || opensLink ? "Sign in" : place ? [id, place.title].filter(Boolean).join(" · ") : "Not found");
  return html`<${Frame} page=${page}>${opensLink && isIn !== null ? html`<${SignInLinkPage} key=${id} token=${id} />` : content(isIn, place, id, error)}<//>`;
}

function content(isIn, place, id, error) {
  if (isIn === false) return html`<${SignInPage} />`;
  if (isIn === null) return error ? html`<h1 tabindex="-1">Lorry</h1><${Failure} error=${error} retry=${begin} />` : html`<${Loading} />`;
  if (place && id && place.one) return html`<${place.one} key=${id} id=${id} />`;
  if (place && !id) return html`<${place.list} />`;
  return html`<div class="title"><h1 tabindex="-1">Page not found</h1></div><p><a href="#/jobs">Go to the jobs</a></p>`;
}

/** On a new page: set the title, scroll to the top, and focus the heading for screen readers. The first page leaves
 * the focus where the browser has set it. */
function useArrival(key, title) {
  const first = useRef(true);
  useEffect(() => {
    document.title = `${title} · Lorry`;
    if (key === null) return;
    if (!first.current) {
      scrollTo(0, 0);
      document.querySelector("main h1")?.focus({ preventScroll: true });
    }
    first.current = false;
  }, [key]);
}

async function begin() {
  problem.set(null);
  try {
    browserSession.set(await read("/v1/browser_session"));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    problem.set(error);
  }
}

render(html`<${App} />`, document.getElementById("app"));
begin();
