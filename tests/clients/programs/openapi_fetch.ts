// The types that openapi-typescript generates, with openapi-fetch.

import { readFileSync, writeFileSync } from "node:fs";
import createClient from "openapi-fetch";
import type { paths } from "./gateway";

async function main([image, output]: string[]): Promise<void> {
  const client = createClient<paths>({
    baseUrl: process.env.GATEWAY_URL!,
    headers: { Authorization: `Bearer ${process.env.GATEWAY_TOKEN}` },
  });
  const submit = (metadata: string, key?: string) =>
    client.POST("/v1/tasks/upscale", {
      params: { header: { "Idempotency-Key": key } },
      body: { image: "", scale: 3, metadata },
      bodySerializer(fields) {
        const form = new FormData();
        form.set("image", new Blob([readFileSync(image!)]), "a.png"); // typed as a string, of which JSON has no binary
        form.set("scale", String(fields.scale));
        form.set("metadata", fields.metadata!);
        return form;
      },
    });

  const { data: submitted } = await submit('{"order": "4711"}', '"openapi-fetch"');
  const { data: task } = await client.GET("/v1/tasks/{task_id}", {
    params: { path: { task_id: submitted!.id }, header: { Prefer: "wait" } },
  });
  if (task?.kind !== "upscale" || task.state !== "succeeded") throw new Error(JSON.stringify(task));
  const { data: artifact } = await client.GET("/v1/tasks/{task_id}/artifacts/{name}", {
    params: { path: { task_id: task.id, name: task.artifacts[0]!.name } },
    parseAs: "arrayBuffer",
  });
  writeFileSync(output!, new Uint8Array(artifact as ArrayBuffer));
  const { error: problem } = await submit("no JSON");
  const { data: listed } = await client.GET("/v1/tasks", { params: { query: { limit: 100 } } });
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
