// Routes in the URL's hash, so that any static server works: #/jobs/ftjob-1?state=active
import { createStore } from "./store.js";

export const route = createStore(parse(location.hash));
addEventListener("hashchange", () => route.set(parse(location.hash)));

function parse(hash) {
  const [path, search = ""] = hash.replace(/^#/, "").split("?", 2);
  const parts = path.split("/").filter(Boolean).map(decode);
  return { page: parts[0] || "jobs", id: parts.length > 1 ? parts.slice(1).join("/") : null, query: new URLSearchParams(search) };
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export const link = {
  jobs: () => "#/jobs",
  job: (id) => `#/jobs/${encodeURIComponent(id)}`,
  queue: () => "#/queue",
  adapters: () => "#/adapters",
  adapter: (id) => `#/adapters/${encodeURIComponent(id)}`,
  models: () => "#/models",
  files: () => "#/files",
  workers: () => "#/workers",
};

/** Change the query of the route without a new history entry, so that a reload keeps the filters. */
export function replaceQuery(entries) {
  const search = new URLSearchParams(Object.entries(entries).filter(([, value]) => value));
  const path = location.hash.split("?", 1)[0] || "#/jobs";
  history.replaceState(null, "", search.size ? `${path}?${search}` : path);
}
