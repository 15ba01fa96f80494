// Requests to the public API. The browser's cookie authenticates them; unsafe methods carry the CSRF header.
import { createStore } from "./store.js";

/** null: not known yet; true or false after the first response of the API. */
export const signedIn = createStore(null);

/** The API's browser_session object: project, key_name, is_operator. */
export const browserSession = createStore(null);

export class ApiError extends Error {
  constructor(status, error) {
    const text = error.message || "The request failed.";
    const remedy = error.remedy || null;
    // The API appends the remedy to the message, for clients that do not read the field `remedy`.
    super(remedy && text.endsWith(remedy) ? text.slice(0, -remedy.length).trimEnd() : text);
    this.status = status;
    this.code = error.code || null;
    this.param = error.param || null;
    this.remedy = remedy;
  }
}

export const read = (path) => request("GET", path);
export const send = (method, path, body) => request(method, path, body);

/** Query string of the entries that have a value, including the question mark. */
export function query(entries) {
  const pairs = Object.entries(entries).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return pairs.length ? `?${new URLSearchParams(pairs)}` : "";
}

/** Streams a chat completion, and calls `onText` with each piece of the answer. `signal` ends it. */
export async function streamAnswer(body, onText, signal) {
  const response = await begin("POST", "/v1/chat/completions", { ...body, stream: true }, signal);
  if (!response.ok) throw failure(response, await response.json().catch(() => null));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value || "")).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const { error, choices } = JSON.parse(line.slice(6));
      if (error) throw new ApiError(response.status, error);
      for (const { delta } of choices) if (delta.content) onText(delta.content);
    }
    if (done) throw new ApiError(0, { message: "The response stream ended early.", remedy: "Send the question again." });
  }
}

/** `body` is an object to send as JSON, or a FormData with a file, whose content type the browser sets. */
async function request(method, path, body) {
  const response = await begin(method, path, body);
  const parsed = await response.json().catch(() => null);
  if (!response.ok) throw failure(response, parsed);
  if (method === "GET") signedIn.set(true);
  return parsed;
}

function begin(method, path, body, signal) {
  const headers = { Accept: "application/json" };
  if (method !== "GET") headers["X-Lorry-Csrf"] = "1";
  const isJson = body !== undefined && !(body instanceof FormData);
  if (isJson) headers["Content-Type"] = "application/json";
  return reach(path, { method, headers, body: isJson ? JSON.stringify(body) : body, signal });
}

/** The error of a response that is not ok. */
function failure(response, parsed) {
  // An invalid sign-in link does not mean that the session has ended.
  if (response.status === 401 && parsed?.error?.code !== "invalid_sign_in_link") signedIn.set(false);
  return new ApiError(response.status, parsed?.error ?? unreadable(response));
}

async function reach(path, options) {
  try {
    return await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
  } catch {
    throw new ApiError(0, {
      message: "The Lorry service does not respond.",
      remedy: "Check that `lorry up` is still running and that this machine can reach it.",
      code: "unreachable",
    });
  }
}

function unreadable(response) {
  return { message: `The service responded with status ${response.status} and no error message.`, remedy: "Check the log of the API server." };
}
