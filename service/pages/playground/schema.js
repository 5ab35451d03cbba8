// The kinds of tasks and their options, read from the gateway's own OpenAPI document.

const NOT_OPTIONS = new Set(["image", "image_url", "metadata", "webhook_url"]);

export async function loadKinds() {
  const document = await (await fetch("openapi.json", { cache: "no-cache" })).json();
  const kinds = [];
  for (const [path, item] of Object.entries(document.paths)) {
    const name = path.match(/^\/v1\/tasks\/([a-z-]+)$/)?.[1];
    const form = item.post?.requestBody?.content["multipart/form-data"]?.schema;
    if (name && form) kinds.push({ name, summary: item.post.summary, options: readOptions(document, form) });
  }
  return kinds;
}

function readOptions(document, form) {
  return Object.entries(resolve(document, form).properties)
    .filter(([name]) => !NOT_OPTIONS.has(name))
    .map(([name, schema]) => ({ name, ...resolve(document, schema) }));
}

function resolve(document, schema) {
  if (!schema.$ref) return schema;
  const { $ref, ...more } = schema;
  const target = $ref.slice(2).split("/").reduce((node, key) => node[key], document);
  return { ...resolve(document, target), ...more };
}
