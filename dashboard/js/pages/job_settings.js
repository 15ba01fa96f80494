// Settings of a job as rows: the requested and the resolved value.
import { power } from "../format.js";
import { epochs, passes } from "../parts/progress.js";

const LABELS = {
  target_modules: "targets", loss: "trained messages", overflow: "long rows", use_rslora: "rsLoRA", use_dora: "DoRA", layers_to_transform: "layers", lora_plus_ratio: "LoRA+ ratio", max_grad_norm: "max gradient norm", type: "schedule", warmup_ratio: "warm-up fraction",
  eps: "epsilon", n_epochs: "epochs", learning_rate_multiplier: "learning rate multiplier", neftune_alpha: "NEFTune alpha",
};
const RUN = ["max_length", "max_steps", "precision", "quantization", "seed", "priority"];

/** [[group, [{label, asked (null: not requested), resolved}]]]. `rows` is the number of usable rows, if known. */
export function groups(job, rows) {
  const asked = job.requested || {};
  const { type = "supervised" } = job.method || {};
  const numbers = asked.method?.[type]?.hyperparameters || asked.hyperparameters || {};
  const resolved = { ...job.hyperparameters, ...job.method?.[type]?.hyperparameters };
  const each = (resolved, requested) => Object.keys(resolved || {}).map((key) => row(key, requested?.[key], resolved[key]));
  return [
    ["Adapter", [
      ...(job.parent_adapter ? [{ label: "continues", asked: given(asked.parent_adapter) || job.parent_adapter, resolved: job.parent_adapter }] : []),
      ...each(job.lora, asked.lora),
    ]],
    ["Optimizer", [...each(named(job.optimizer), named(asked.optimizer)), ...each(job.schedule, asked.schedule)]],
    ["Run", [
      row("method", asked.method?.type, type),
      ...each({ ...resolved, n_epochs: passesOf(job, rows) }, numbers),
      ...(job.validation_file ? [{ label: "evaluation", asked: every(asked.evaluation?.every_steps), resolved: every(job.evaluation?.every_steps) || "10 times per job" }] : []),
      ...(job.validation_file && job.evaluation?.keep ? [{ label: "exported weights", asked: given(asked.evaluation?.keep), resolved: job.evaluation.keep }] : []),
      ...(job.evaluation?.samples ? each(prompted(job.evaluation.samples), prompted(asked.evaluation?.samples)) : []),
      ...(job.early_stopping ? each(job.early_stopping, asked.early_stopping) : []),
      { label: "checkpoint", asked: every(asked.checkpoint_every_steps), resolved: every(job.checkpoint_every_steps) },
      ...each(job.data, asked.data),
      ...RUN.map((key) => row(key, asked[key], job[key])),
    ]],
  ].filter(([, rows]) => rows.length);
}

/** Renames `type`, which the schedule has as well. */
const named = ({ type, ...others } = {}) => (type === undefined ? others : { optimizer: type, ...others });

const prompted = ({ prompts, max_tokens } = {}) => ({ sample_prompts: prompts?.map((each) => JSON.stringify(each)), sample_max_tokens: max_tokens });

const row = (key, asked, resolved) => ({ label: LABELS[key] || key.replaceAll("_", " "), asked: given(asked), resolved: text(resolved, key) });

/** The number of passes. max_steps may end the job before the requested number. */
function passesOf(job, rows) {
  const { n_epochs } = job.hyperparameters;
  const total = epochs(job, rows)?.total;
  if (total === undefined) return job.max_steps ? `up to ${n_epochs} (max_steps)` : n_epochs;
  return total < n_epochs ? `${passes(total)} of ${n_epochs} (max_steps)` : n_epochs;
}

const every = (steps) => (typeof steps === "number" ? `every ${steps} steps` : given(steps));

const given = (value) => (value === undefined || value === null ? null : text(value));

function text(value, key = "") {
  if (Array.isArray(value)) return value.join(", ");
  if (value && typeof value === "object") return Object.entries(value).map(([name, each]) => `${name}: ${each}`).join(", ") || "none";
  if (value === null || value === undefined) return "none";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number" || key === "seed") return String(value);
  return power(value);
}
