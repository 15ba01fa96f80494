// Requests to the public API. The browser's cookie carries the person; unsafe methods carry the CSRF header.
import { createStore } from "./store.js";

/** null: not known yet; true or false once the API has answered. */
export const signedIn = createStore(null);

/** The API's browser_session object: project, key_name, is_operator. */
export const person = createStore(null);

export class ApiError extends Error {
  constructor(status, error) {
    const told = error.message || "The request failed.";
    const remedy = error.remedy || null;
    // On the wire the message ends with the remedy, for clients that know of no such field.
    super(remedy && told.endsWith(remedy) ? told.slice(0, -remedy.length).trimEnd() : told);
    this.status = status;
    this.code = error.code || null;
    this.param = error.param || null;
    this.remedy = remedy;
  }
}

export const read = (path) => request("GET", path);
export const send = (method, path, body) => request(method, path, body);

/** Query text of the entries that have a value, with its question mark. */
export function query(entries) {
  const pairs = Object.entries(entries).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return pairs.length ? `?${new URLSearchParams(pairs)}` : "";
}

/** `body` is an object to send as JSON, or a form with a file, which the browser writes and labels itself. */
async function request(method, path, body) {
  const headers = { Accept: "application/json" };
  if (method !== "GET") headers["X-Lorry-Csrf"] = "1";
  const isJson = body !== undefined && !(body instanceof FormData);
  if (isJson) headers["Content-Type"] = "application/json";
  const response = await reach(path, { method, headers, body: isJson ? JSON.stringify(body) : body });
  const parsed = await response.json().catch(() => null);
  if (response.ok) {
    if (method === "GET") signedIn.set(true);
    return parsed;
  }
  // A link that is no longer valid says nothing about the session.
  if (response.status === 401 && parsed?.error?.code !== "invalid_sign_in_link") signedIn.set(false);
  throw new ApiError(response.status, parsed?.error ?? unreadable(response));
}

async function reach(path, options) {
  try {
    return await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
  } catch {
    throw new ApiError(0, {
      message: "The Lorry service does not answer.",
      remedy: "Check that `lorry up` is still running and that this machine can reach it.",
      code: "unreachable",
    });
  }
}

function unreadable(response) {
  return { message: `The service answered ${response.status} without saying why.`, remedy: "Look at its log." };
}
