// Calls of the gateway. The token is in this module's memory only: never in storage, a cookie or an address.

let token = "";

export function setToken(text) {
  token = text.trim();
}

// A problem document of the gateway, or what stands for one if no response came.
export class Problem extends Error {
  constructor(fields, retryAfter = null) {
    super(fields.detail);
    Object.assign(this, fields);
    this.retryAfter = retryAfter;
  }
}

export const noResponse = () =>
  new Problem({ code: "", title: "No response", detail: "The gateway can't be reached. Try again.", status: 0 });

export async function call(path, { headers = {}, ...more } = {}) {
  let response;
  try {
    response = await fetch(path.replace(/^\//, ""), {
      ...more,
      headers: { Authorization: `Bearer ${token}`, ...headers },
      credentials: "omit",
      cache: "no-store",
      redirect: "error",
    });
  } catch {
    throw noResponse();
  }
  if (response.ok) return response;
  const isProblem = response.headers.get("content-type")?.startsWith("application/problem+json");
  const fields = isProblem ? await response.json() : {};
  const fallback = { code: "", title: `Status ${response.status}`, detail: "A proxy may have answered.", status: response.status };
  throw new Problem({ ...fallback, ...fields }, response.headers.get("retry-after"));
}

export const readJson = async (path) => (await call(path)).json();

export async function submit(kind, picture, options, key) {
  const form = new FormData();
  for (const [name, value] of Object.entries(options)) form.append(name, value);
  form.append("image", picture, picture.name);
  const response = await call(`v1/tasks/${kind}`, { method: "POST", body: form, headers: { "Idempotency-Key": `"${key}"` } });
  return response.json();
}

// Call `onChange` with the task at each change until it has ended; returns it. Aborting the signal stops it silently.
export async function follow(task, onChange, signal) {
  let last = null;
  while (!isFinal(task)) {
    try {
      const headers = last ? { "Last-Event-ID": last } : {};
      const response = await call(task.links.events, { headers, signal });
      for await (const event of readEvents(response.body)) {
        last = event.id;
        task = JSON.parse(event.data);
        onChange(task);
      }
      if (response.status === 204) task = await readJson(task.links.self);
    } catch (error) {
      if (signal.aborted) return task;
      if (error instanceof Problem && error.status >= 400 && error.status < 500 && error.status !== 429) throw error;
    }
    if (!isFinal(task)) await pause(1500, signal); // a stream ends after some minutes, or with the process
    if (signal.aborted) return task;
  }
  return task;
}

export const isFinal = (task) => task.state === "succeeded" || task.state === "failed";

// Yield the events of a stream as objects of its fields (https://html.spec.whatwg.org/multipage/server-sent-events.html).
async function* readEvents(body) {
  if (!body) return;
  let text = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: ?(.*)/s, 2)));
      if (fields.data) yield fields;
    }
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
