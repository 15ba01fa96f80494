// Formatting of numbers and times. All functions return text; an unknown value is an en dash.
export const UNKNOWN = "–";
const GROUPED = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const ABSOLUTE = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const DAY = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });
const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

const known = (value) => typeof value === "number" && Number.isFinite(value);

export const count = (value) => (known(value) ? GROUPED.format(value).replaceAll(",", "\u202f") : UNKNOWN);

export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

/** 4 120 000 → 4.12 M */
export const compact = (value) => scaled(value, 1000, ["", "k", "M", "G", "T"]);

export const bytes = (value) => scaled(value, 1000, ["B", "kB", "MB", "GB", "TB"]);

function scaled(value, step, units) {
  if (!known(value)) return UNKNOWN;
  let at = 0;
  let rest = value;
  while (Math.abs(rest) >= step && at < units.length - 1) {
    rest /= step;
    at += 1;
  }
  const digits = at === 0 || rest >= 100 ? 0 : rest >= 10 ? 1 : 2;
  return `${rest.toFixed(digits)} ${units[at]}`.trim();
}

export function loss(value) {
  if (!known(value)) return UNKNOWN;
  return Math.abs(value) >= 100 ? value.toFixed(1) : Math.abs(value) >= 0.01 || value === 0 ? value.toFixed(3) : Math.abs(value) >= 0.001 ? value.toFixed(4) : power(value);
}

export const percent = (part, digits = 0) => (known(part) ? `${(part * 100).toFixed(digits)} %` : UNKNOWN);

/** A share with two significant digits, without an exponent: 0.0363 → 3.6 %. */
export const share = (part) => (known(part) ? `${part < 0.995 ? Number((part * 100).toPrecision(2)) : (part * 100).toFixed(0)} %` : UNKNOWN);

/** A measured short time: 0.0123 → 12.3 ms. */
export const seconds = (value) => (known(value) ? (value < 1 ? `${Number((value * 1000).toPrecision(3))} ms` : `${Number(value.toPrecision(3))} s`) : UNKNOWN);

/** A relative change with its sign: −12.3 %. */
export function change(from, to) {
  if (!known(from) || !known(to) || from === 0) return UNKNOWN;
  const part = (to - from) / from;
  return `${part <= 0 ? "−" : "+"}${Math.abs(part * 100).toFixed(1)} %`;
}

export const rate = (value) => (known(value) ? `${count(value)} tok/s` : UNKNOWN);

/** 0.00000012 → 1.2 × 10⁻⁷; numbers of ordinary size are not in scientific notation. */
export function power(value, digits = 2) {
  if (!known(value)) return UNKNOWN;
  if (value === 0 || (Math.abs(value) >= 0.001 && Math.abs(value) < 1e5)) return String(Number(value.toPrecision(4)));
  const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
  const raised = [...exponent.replace("+", "")].map((sign) => SUPERSCRIPT[sign]).join("");
  return `${Number(mantissa)}\u00a0×\u00a010${raised}`;
}

export function duration(seconds) {
  if (!known(seconds)) return UNKNOWN;
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 600) return whole % 60 ? `${Math.floor(whole / 60)} min ${whole % 60} s` : `${whole / 60} min`;
  const minutes = Math.round(whole / 60);
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 2880) return minutes % 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${minutes / 60} h`;
  return `${Math.floor(minutes / 1440)} d ${Math.round((minutes % 1440) / 60)} h`;
}

export function ago(at, now) {
  const seconds = now - at;
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  if (seconds < 7 * 86400) return `${Math.floor(seconds / 86400)} d ago`;
  return DAY.format(at * 1000);
}

export const absolute = (at) => ABSOLUTE.format(at * 1000);

/** The time of day of a future moment, with the date if it is more than 20 hours away. */
export function clock(at, now) {
  return at - now > 20 * 3600 ? `${DAY.format(at * 1000)}, ${CLOCK.format(at * 1000)}` : CLOCK.format(at * 1000);
}

/** The start of a digest (`sha256:9f3c…`) or of a long id. */
export const short = (text, length = 12) => (text && text.length > length + 2 ? `${text.slice(0, length)}…` : text || UNKNOWN);
