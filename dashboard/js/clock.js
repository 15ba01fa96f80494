// The time, as a value that moves: everything relative ("3 min ago") is redrawn from here.
import { createStore, useStore } from "./store.js";

const TICK_MS = 5000;
const now = createStore(Date.now() / 1000);
setInterval(() => { if (!document.hidden) now.set(Date.now() / 1000); }, TICK_MS);
document.addEventListener("visibilitychange", () => now.set(Date.now() / 1000));

/** Seconds since 1970. */
export const useNow = () => useStore(now);
