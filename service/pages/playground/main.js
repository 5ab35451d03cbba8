// The playground: connects its parts.

import { Problem, call, follow, isFinal, noResponse, setToken, submit } from "./api.js";
import { formatCost, refresh } from "./account.js";
import { showCode } from "./code.js";
import { byId, element, formatTime } from "./dom.js";
import { clearErrors, readOptions, renderOptions, showErrors } from "./options.js";
import { clearResults, showResults } from "./result.js";
import { loadKinds } from "./schema.js";

const SAMPLES = { upscale: "photo.jpg", vectorize: "logo.png", "face-enhance": "face.jpg", seamless: "texture.jpg" };
const pictures = new Map(); // what was sent for each task of this tab
const form = byId("task-form");
const options = byId("options");
let kinds = [];
let picture = null;
let key = null; // of the submission in the form; the next one begins with its first change
let running = new AbortController();

const chosenKind = () => form.elements.kind.value;

function usePicture(file) {
  picture = file;
  key = null;
  const preview = byId("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.hidden = !file;
  if (file) preview.src = URL.createObjectURL(file);
  byId("picture-name").textContent = file ? `${file.name}, ${Math.ceil(file.size / 1024).toLocaleString()} KiB` : "";
}

async function useSample() {
  const name = SAMPLES[chosenKind()] ?? SAMPLES.upscale;
  const blob = await (await call(`playground/${name}`)).blob();
  byId("picture").value = "";
  usePicture(new File([blob], name, { type: blob.type }));
}

function showKinds() {
  const radios = kinds.map(({ name, summary }) =>
    element("label", { className: "kind" }, element("input", { type: "radio", name: "kind", value: name }), element("strong", {}, name), element("span", {}, summary)),
  );
  byId("kinds").append(...radios);
  form.elements.kind[0].checked = true;
  renderOptions(options, kinds[0].options);
}

function showProblem(problem) {
  const link = problem.code ? element("a", { href: `docs/problems#${problem.code}` }, problem.code) : null;
  const facts = [problem.status || null, problem.instance ? `request ${problem.instance}` : null].filter(Boolean).join(" · ");
  const wait = problem.retryAfter ? ` Repeat after ${problem.retryAfter} s.` : "";
  byId("problem").replaceChildren(
    element("div", { className: "notice bad" }, element("strong", {}, problem.title), element("p", {}, problem.detail + wait), element("p", { className: "hint" }, link, link ? " · " : null, facts)),
  );
  byId("problem").scrollIntoView({ block: "nearest" });
  showErrors(options, problem.errors ?? []);
}

function clearOutcome() {
  running.abort();
  running = new AbortController();
  byId("problem").replaceChildren();
  byId("details").replaceChildren();
  byId("code").hidden = true;
  clearResults(byId("artifacts"));
  clearErrors(options);
}

function showState(task) {
  const steps = byId("steps");
  steps.hidden = false;
  const order = ["queued", "running", "end"];
  const current = isFinal(task) ? 2 : order.indexOf(task.state);
  [...steps.children].forEach((step, index) => {
    step.classList.toggle("done", index < current || isFinal(task));
    step.classList.toggle("failed", index === 2 && task.state === "failed");
    if (index === current) step.setAttribute("aria-current", "step");
    else step.removeAttribute("aria-current");
  });
  steps.lastElementChild.textContent = isFinal(task) ? task.state : "ended";
  byId("status").textContent = `The task ${isFinal(task) ? "has" : "is"} ${task.state}.`;
  const seconds = task.finished_at && ((new Date(task.finished_at) - new Date(task.created_at)) / 1000).toFixed(1);
  const rows = { Task: task.id, Kind: task.kind, Submitted: formatTime(task.created_at), Duration: seconds && `${seconds} s`, Cost: isFinal(task) && formatCost(task.cost) };
  byId("details").replaceChildren(
    ...Object.entries(rows).filter(([, value]) => value).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
}

// Show a task from now to its end, then its results.
async function show(task) {
  const { signal } = running;
  showState(task);
  task = await follow(task, (changed) => signal.aborted || showState(changed), signal);
  if (signal.aborted) return;
  showState(task);
  if (task.error) showProblem({ title: "The task has failed", detail: task.error.detail, code: "", status: 0 });
  const sent = pictures.get(task.id);
  const names = { image: ".png", vector: ".svg", grid: ".png" };
  const defaults = Object.fromEntries((kinds.find(({ name }) => name === task.kind)?.options ?? []).map((option) => [option.name, option.default]));
  const changed = Object.entries(task.options).filter(([name, value]) => name in defaults && value !== defaults[name]);
  showCode({
    address: new URL(".", location).href.replace(/\/$/, ""),
    kind: task.kind,
    file: sent?.name ?? "photo.jpg",
    options: Object.fromEntries(changed),
    artifacts: task.artifacts.map(({ name }) => ({ name, file: `${task.kind}-${name}${names[name] ?? ""}` })),
  });
  await showResults(byId("artifacts"), task, sent);
}

// Run an action; a problem, also a response that breaks off, is shown, and the form is usable again after it.
async function attempt(action) {
  try {
    await action();
  } catch (error) {
    byId("status").textContent = "";
    showProblem(error instanceof Problem ? error : noResponse());
    if (!(error instanceof Problem)) console.error(error);
  }
}

async function openTask(task) {
  clearOutcome();
  byId("result-title").focus();
  await attempt(() => show(task));
}

const connect = () => attempt(() => refresh(openTask));

byId("token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setToken(byId("token").value);
  byId("problem").replaceChildren();
  await connect();
});
byId("token").addEventListener("change", () => setToken(byId("token").value));

form.addEventListener("input", (event) => {
  key = null;
  if (event.target.name === "kind") renderOptions(options, kinds.find(({ name }) => name === chosenKind()).options);
});
byId("picture").addEventListener("change", (event) => usePicture(event.target.files[0] ?? null));
byId("preview").addEventListener("error", ({ target }) => (target.hidden = true)); // no picture: submitting it says so
byId("sample").addEventListener("click", () => attempt(useSample));
const drop = byId("drop");
for (const name of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0]) usePicture(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) usePicture(file);
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  clearOutcome();
  byId("steps").hidden = true;
  if (!picture) {
    byId("status").textContent = "";
    showProblem({ title: "No picture", detail: "Choose, drop or paste a picture first, or use the sample.", code: "", status: 0 });
    return;
  }
  const button = byId("submit");
  button.disabled = true;
  byId("status").textContent = "Sending the picture…";
  byId("result-title").scrollIntoView({ block: "nearest" });
  key ??= crypto.randomUUID?.() ?? [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  await attempt(async () => {
    const sent = picture;
    const task = await submit(chosenKind(), sent, readOptions(options), key).finally(() => (button.disabled = false));
    key = null;
    pictures.set(task.id, sent);
    await show(task);
  });
  await connect();
});

kinds = await loadKinds();
showKinds();
