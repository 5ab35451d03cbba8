// The client that @hey-api/openapi-ts generates.

import { readFileSync, writeFileSync } from "node:fs";
import { listTasks, readArtifact, readTask, submitUpscale } from "./hey_api_client";
import { client } from "./hey_api_client/client.gen";

async function main([image, output]: string[]): Promise<void> {
  client.setConfig({ baseUrl: process.env.GATEWAY_URL!, auth: () => process.env.GATEWAY_TOKEN! });
  const file = new File([readFileSync(image!)], "a.png");
  const submit = (metadata: string, key?: string) =>
    submitUpscale({ body: { image: file, scale: 3, metadata }, headers: { "Idempotency-Key": key } });

  const { data: submitted } = await submit('{"order": "4711"}', '"hey-api"');
  const { data: task } = await readTask({ path: { task_id: submitted!.id }, headers: { Prefer: "wait" } });
  if (task?.kind !== "upscale" || task.state !== "succeeded") throw new Error(JSON.stringify(task));
  const { data: artifact } = await readArtifact({ path: { task_id: task.id, name: task.artifacts[0]!.name } });
  writeFileSync(output!, new Uint8Array(await (artifact as Blob).arrayBuffer()));
  const { error: problem } = await submit("no JSON");
  const { data: listed } = await listTasks({ query: { limit: 100 } });
  // Each kind has its own options.
  const optionOf = (item: (typeof listed & {})["items"][number]) =>
    item.kind === "upscale" ? item.options.scale : item.kind === "seamless" ? item.options.fit : undefined;
  const result = {
    scale: optionOf(task),
    order: task.metadata.order,
    code: problem!.code,
    fields: problem!.errors?.map((error) => error.field),
    kinds: [...new Set(listed!.items.map((item) => item.kind))].sort(),
  };
  console.log(JSON.stringify(result));
}

void main(process.argv.slice(2));
