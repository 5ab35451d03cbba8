// `fetch` of Node.js.

import { readFileSync, writeFileSync } from "node:fs";

const [image, output] = process.argv.slice(2);
const call = (path, options = {}) =>
  fetch(process.env.GATEWAY_URL + path, {
    ...options,
    headers: { Authorization: `Bearer ${process.env.GATEWAY_TOKEN}`, ...options.headers },
  });

function submit(metadata, headers) {
  const body = new FormData();
  body.set("image", new Blob([readFileSync(image)]), "a.png");
  body.set("scale", "3");
  body.set("metadata", metadata);
  return call("/v1/tasks/upscale", { method: "POST", body, headers });
}

const accepted = await submit('{"order": "4711"}', { "Idempotency-Key": '"fetch"' });
const task = await (await call(accepted.headers.get("Location"), { headers: { Prefer: "wait" } })).json();
const artifact = await call(task.artifacts[0].href);
writeFileSync(output, new Uint8Array(await artifact.arrayBuffer()));
const problem = await (await submit("no JSON")).json();
const fields = problem.errors.map((error) => error.field);
console.log(JSON.stringify({ scale: task.options.scale, order: task.metadata.order, code: problem.code, fields }));
