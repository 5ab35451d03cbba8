// The curl, Python and TypeScript for what was just done. They read the token from a variable.

import { byId, element } from "./dom.js";

const LANGUAGES = { curl: toCurl, Python: toPython, TypeScript: toTypeScript };

// Show the programs of a submission: {address, kind, file, options, artifacts}, where options has values by name.
export function showCode(work) {
  const tabs = document.querySelector("#code [role=tablist]");
  const panel = byId("code-panel");
  const chosen = tabs.querySelector('[aria-selected="true"]')?.textContent ?? "curl";
  const buttons = Object.keys(LANGUAGES).map((name) => element("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "code-panel" }, name));
  const select = (button) => {
    for (const other of buttons) {
      other.setAttribute("aria-selected", String(other === button));
      other.tabIndex = other === button ? 0 : -1;
    }
    const text = LANGUAGES[button.textContent](work);
    panel.replaceChildren(renderBlock(text));
    panel.setAttribute("aria-labelledby", button.id);
  };
  buttons.forEach((button, index) => {
    button.addEventListener("click", () => select(button));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = buttons.at((index + step) % buttons.length);
      select(next);
      next.focus();
    });
  });
  tabs.replaceChildren(...buttons);
  select(buttons.find((button) => button.textContent === chosen));
  byId("code").hidden = false;
}

function renderBlock(text) {
  const block = element("div", { className: "copyable" }, element("pre", { tabIndex: 0 }, element("code", {}, text)));
  if (navigator.clipboard) {
    const copy = element("button", { type: "button", className: "copy" }, "Copy");
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    });
    block.append(copy);
  }
  return block;
}

const quoteShell = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

function toCurl({ address, kind, file, options, artifacts }) {
  const fields = Object.entries(options).map(([name, value]) => ` --form-string ${quoteShell(`${name}=${value}`)}`);
  const result = artifacts.map(
    ({ name, file: saved }) =>
      `curl -sS --fail-with-body -o ${saved} -H "Authorization: Bearer $GATEWAY_TOKEN" "${address}$TASK/artifacts/${name}"`,
  );
  return `# export GATEWAY_TOKEN=igw_...
KEY=$(cat /proc/sys/kernel/random/uuid)  # the same for every attempt: it is charged once
TASK=$(curl -sS --fail-with-body -o task.json -w '%header{location}' \\
    -H "Authorization: Bearer $GATEWAY_TOKEN" -H "Idempotency-Key: \\"$KEY\\"" -H 'Prefer: wait=60' \\
    -F ${quoteShell(`image=@${file}`)}${fields.join("")} ${address}/v1/tasks/${kind})
until grep -qE '"state":"(succeeded|failed)"' task.json; do
    curl -sS --fail-with-body -o task.json \\
        -H "Authorization: Bearer $GATEWAY_TOKEN" -H 'Prefer: wait=60' "${address}$TASK"
done
${result.join("\n")}
`;
}

const literalPython = (value) => (typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value));

function toPython({ address, kind, file, options, artifacts }) {
  const named = Object.entries(options).map(([name, value]) => `, ${name}=${literalPython(value)}`);
  const results = artifacts.map(({ name, file: saved }) => `    gateway.download(task, ${JSON.stringify(saved)}, name=${JSON.stringify(name)})\n`);
  return `# Needs the gateway's wheel, which the operators give you, and: export GATEWAY_TOKEN=igw_...
from service.client import GatewayClient

with GatewayClient(${JSON.stringify(address)}) as gateway:
    # All attempts have one Idempotency-Key, so it is charged once.
    task = gateway.submit(${JSON.stringify(kind)}, ${JSON.stringify(file)}${named.join("")})
    task = gateway.wait(task)
${results.join("")}print(task.state, task.cost)
`;
}

function toTypeScript({ address, kind, file, options }) {
  const fields = Object.entries(options).map(([name, value]) => `form.set(${JSON.stringify(name)}, ${JSON.stringify(String(value))});\n`);
  return `import { randomUUID } from "node:crypto";
import { openAsBlob } from "node:fs";
import { writeFile } from "node:fs/promises";

const address = ${JSON.stringify(address)};
const headers = { Authorization: \`Bearer \${process.env.GATEWAY_TOKEN}\`, Prefer: "wait=60" };
const form = new FormData();
form.set("image", await openAsBlob(${JSON.stringify(file)}), ${JSON.stringify(file)});
${fields.join("")}const key = \`"\${randomUUID()}"\`; // the same for every attempt: it is charged once
let response = await fetch(\`\${address}/v1/tasks/${kind}\`, {
  method: "POST",
  headers: { ...headers, "Idempotency-Key": key },
  body: form,
});
let task = await response.json();
while (response.ok && !["succeeded", "failed"].includes(task.state)) {
  response = await fetch(address + task.links.self, { headers });
  task = await response.json();
}
if (!response.ok) throw new Error(\`\${task.code}: \${task.detail}\`);
for (const artifact of task.artifacts) {
  const result = await fetch(address + artifact.href, { headers });
  await writeFile(\`\${task.kind}-\${artifact.name}\`, Buffer.from(await result.arrayBuffer()));
}
console.log(task.state, task.cost);
`;
}
