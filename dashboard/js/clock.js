// The current time as a store: relative times ("3 min ago") are redrawn when it changes.
import { createStore, useStore } from "./store.js";

const TICK_MS = 5000;
const now = createStore(Date.now() / 1000);
setInterval(() => { if (!document.hidden) now.set(Date.now() / 1000); }, TICK_MS);
document.addEventListener("visibilitychange", () => now.set(Date.now() / 1000));

/** The current time in seconds since 1970. */
export const useNow = () => useStore(now);
