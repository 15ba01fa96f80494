// The list of uploaded files: their data, problems and jobs; upload and deletion.
import { html, useEffect, useRef, useState } from "../html.js";
import { query, read } from "../api.js";
import { useLive } from "../jobs_data.js";
import { useResource } from "../resource.js";
import { Ago, Empty, Failure, Id, Loading } from "../parts/basics.js";
import { Delete, useDeletion } from "../parts/deletion.js";
import { Upload } from "./file_upload.js";
import * as format from "../format.js";

const PAGE = 30;
const JOBS = 100;
const KINDS = { chat: "chat data", completion: "prompts with completions", text: "plain text", preference: "preference pairs", unpaired: "labeled answers" };
const PURPOSES = { "fine-tune": "training data", "fine-tune-results": "metrics of a job", user_data: "other data" };

export function FilesPage() {
  const { files, hasMore, loading, error, load, more } = useFiles();
  const { data: jobs, reload: reloadJobs } = useResource(`/v1/fine_tuning/jobs${query({ limit: JOBS })}`);
  const deletion = useDeletion("/v1/files", load);
  useLive(reloadJobs);
  return html`
    <div class="title"><h1 tabindex="-1">Files</h1></div>
    <${Upload} done=${load} />
    ${error && html`<${Failure} error=${error} retry=${load} />`}
    ${deletion.error && html`<${Failure} error=${deletion.error} />`}
    ${loading ? html`<${Loading} />` : files.length ? html`<${FilesTable} files=${files} jobs=${jobs} deletion=${deletion} />`
      : !error && html`<${Empty} title="No files yet." command="lorry files upload train.jsonl">Upload one here or in a terminal:<//>`}
    ${hasMore && html`<p class="more"><button type="button" onClick=${more}>Show older files</button></p>`}`;
}

/** The project's files, newest first; `load` reloads as many as are on the screen. */
function useFiles() {
  const [state, setState] = useState({ files: [], hasMore: false, loading: true, error: null });
  const limit = useRef(PAGE);
  const load = async () => {
    try {
      const { data, has_more } = await read(`/v1/files${query({ limit: limit.current })}`);
      setState({ files: data, hasMore: has_more, loading: false, error: null });
    } catch (error) {
      setState((was) => ({ ...was, loading: false, error }));
    }
  };
  useLive(load);
  const more = () => { limit.current += PAGE; return load(); };
  return { ...state, load, more };
}

const COLUMNS = [["File"], ["Purpose"], ["Size"], ["Data"], ["Actions", "unseen"]];

function FilesTable({ files, jobs, deletion }) {
  return html`<table class="table cards uploads" role="table"><caption class="unseen">Files, newest first</caption>
    <thead role="rowgroup"><tr role="row">${COLUMNS.map(([name, kind]) => html`<th role="columnheader" scope="col" key=${name}><span class=${kind}>${name}</span></th>`)}</tr></thead>
    <tbody role="rowgroup">${files.map((file) => html`<${Row} key=${file.id} file=${file} deletion=${deletion}
      hasOlderJobs=${jobs?.has_more}
      jobs=${jobs?.data.filter((job) => job.training_file === file.id || job.validation_file === file.id)} />`)}</tbody></table>`;
}

function Row({ file, jobs, hasOlderJobs, deletion }) {
  return html`<tr role="row">
    <th role="rowheader" scope="row" class="file-name"><b>${file.filename}</b><span class="sub"><span><${Ago} at=${file.created_at} /></span>${jobs && html`<span>${usedBy(jobs.length, hasOlderJobs)}</span>`}</span>
      <${Id} id=${file.id} what=${`id of ${file.filename}`} length=${16} /></th>
    <td role="cell">${KINDS[file.kind] || PURPOSES[file.purpose] || file.purpose}<span class="sub">${file.purpose}</span></td>
    <td role="cell">${format.bytes(file.bytes)}${typeof file.rows === "number" && html`<span class="sub">${format.plural(file.rows, "row")}</span>`}</td>
    <td role="cell" class="data-cell"><${Found} file=${file} job=${jobs?.[0]} /></td>
    <td role="cell" class="act-cell"><span class="buttons"><a class="button" href=${`/v1/files/${file.id}/content`} download>Download<span class="unseen"> ${file.filename}</span></a>
      <${Delete} deletion=${deletion} id=${file.id} name=${file.filename} what="file" text="New jobs can't use it any more. Finished jobs keep their adapters, and the digest of the file in their records." /></span></td>
  </tr>`;
}

function usedBy(number, hasOlderJobs) {
  if (hasOlderJobs) return `used by ${number || "none"} of the newest ${JOBS} jobs`;
  return `used by ${number ? format.plural(number, "job") : "no job"}`;
}

/** What preparation found, with the base model of `job`, the latest one with this file. A file without jobs was not prepared. */
function Found({ file, job }) {
  const model = job?.model;
  const { data, error, isGone, reload } = useReport(file, job);
  useEffect(() => { reload(); }, [job?.status]);
  if (file.status === "error") return html`<span class="bad-text">${file.status_details || "The file can't be used."}</span>`;
  if (file.purpose !== "fine-tune") return html`<span class="soft">not checked</span>`;
  if (!model) return html`<span class="soft">every line is valid</span><span class="sub">tokens are counted when a job first uses it</span>`;
  const report = data?.report;
  if (error && !report) return html`<span class="bad-text">Couldn't load the data report: ${error.message}</span>`;
  if (!report) return html`<span class="soft">${!data ? "…" : isGone ? "never counted" : "not counted yet"}</span>`;
  const problems = problemsOf(report);
  return html`${problems.length ? html`<ul class="problems">${problems.map((problem) => html`<li key=${problem}>${problem}</li>`)}</ul>` : html`<span class="good-text">no problems</span>`}
    <span class="sub"><span>${format.compact(report.tokens)} tokens</span><span>for ${model}${isGone && " (deleted)"}</span></span>`;
}

/** The report of a file. If the base model is deleted, only the job still has the report. */
function useReport(file, job) {
  const ofModel = useResource(job ? `/v1/files/${file.id}/report${query({ model: job.model })}` : null);
  const isGone = ofModel.error?.status === 404;
  const ofJob = useResource(isGone ? `/v1/fine_tuning/jobs/${job.id}/data_report` : null);
  if (!isGone) return { ...ofModel, isGone };
  const report = ofJob.data?.[job.training_file === file.id ? "training" : "validation"];
  return { data: ofJob.data && { report }, error: ofJob.error, isGone, reload: ofModel.reload };
}

function problemsOf({ truncated_rows, dropped_rows, split_rows, empty_rows, duplicate_rows, max_length }) {
  return [
    empty_rows > 0 && `${format.plural(empty_rows, "row")} without trained tokens`,
    truncated_rows > 0 && `${format.plural(truncated_rows, "row")} truncated to ${format.count(max_length)} tokens`,
    dropped_rows > 0 && `${format.plural(dropped_rows, "row")} of more than ${format.count(max_length)} tokens, dropped`,
    split_rows > 0 && `${format.plural(split_rows, "row")} split at ${format.count(max_length)} tokens`,
    duplicate_rows > 0 && `${format.plural(duplicate_rows, "duplicate row")}, kept`,
  ].filter(Boolean);
}
