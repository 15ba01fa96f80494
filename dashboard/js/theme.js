// The theme: light, dark, or that of the system. It is stored in this browser.
import { createStore } from "./store.js";

const ORDER = ["system", "light", "dark"];
export const theme = createStore(document.documentElement.dataset.theme || "system");

/** Changes with the colors on the screen, so that charts are drawn again. */
export const palette = createStore(0);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => palette.set(palette.get() + 1));

export function nextTheme() {
  const next = ORDER[(ORDER.indexOf(theme.get()) + 1) % ORDER.length];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  remember(next);
  theme.set(next);
  palette.set(palette.get() + 1);
}

function remember(value) {
  try {
    if (value === "system") localStorage.removeItem("lorry-theme");
    else localStorage.setItem("lorry-theme", value);
  } catch {
    // Storage may be blocked; the choice then lasts until the page is closed.
  }
}

/** The current value of a custom property, as a color that a canvas can use. */
export function color(name) {
  const probe = document.createElement("span");
  probe.className = "probe";
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const resolved = getComputedStyle(probe).color;
  probe.remove();
  return resolved;
}
