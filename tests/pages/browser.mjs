// A browser and the gateway under test, for the tests beside this file; `test_browser.py` sets the variables.

import { strict as assert } from "node:assert";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { env } from "node:process";
import { after, before } from "node:test";
import { chromium } from "playwright-core";

export const { URL: ROOT, TOKEN, POOR_TOKEN, LIMITED_TOKEN, SANDBOX, FOLDER } = env;
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
let browser;

before(async () => {
  browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox"] });
});
after(() => browser.close());

// Run `use` with a new page, which must report no error and no violation of its policy.
export async function withPage(use, { width = 1280, colorScheme = "light", allow = /Failed to load resource/ } = {}) {
  const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme });
  const faults = [];
  try {
    const page = await context.newPage();
    page.setDefaultTimeout(60_000);
    page.on("pageerror", (error) => faults.push(error.stack));
    page.on("console", (message) => message.type() === "error" && faults.push(message.text()));
    await use(page);
    assert.deepEqual(faults.filter((text) => !allow.test(text)), []);
  } finally {
    await context.close();
  }
}

export async function assertAccessible(page) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => globalThis.axe.run());
  const found = violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html, failureSummary }) => `${html} ${failureSummary}`).join("; ")}`);
  assert.deepEqual(found, []);
  const { scrollWidth, clientWidth } = await page.evaluate(() => {
    const { scrollWidth, clientWidth } = document.documentElement;
    return { scrollWidth, clientWidth };
  });
  assert.ok(scrollWidth <= clientWidth, `${page.url()} scrolls sideways: ${scrollWidth}`);
}

// Replace the faults of the upstream, and set how long its tasks take.
export async function setBehaviour(seconds = 0, ...faults) {
  const body = JSON.stringify({ seconds, faults });
  const response = await fetch(`${SANDBOX}/_control/behaviour`, { method: "PUT", body });
  assert.ok(response.ok, await response.text());
}

export async function countSubmissions() {
  const requests = await (await fetch(`${SANDBOX}/_control/requests`)).json();
  return requests.filter(({ operation }) => operation === "submit").length;
}
