import { strict as assert } from "node:assert";
import { writeFileSync } from "node:fs";
import { test } from "node:test";
import { FOLDER, LIMITED_TOKEN, POOR_TOKEN, ROOT, TOKEN, assertAccessible, countSubmissions, setBehaviour, withPage } from "./browser.mjs";

async function open(page, token = TOKEN) {
  await page.goto(`${ROOT}/playground`);
  await page.getByRole("radio").first().waitFor();
  await page.getByLabel("Token", { exact: true }).fill(token);
  await page.getByRole("button", { name: "Connect" }).click();
}

async function choose(page, kind) {
  await page.getByRole("radio", { name: new RegExp(`^${kind} `) }).check();
  await page.getByRole("button", { name: "Use a sample" }).click();
  await page.locator("#picture-name", { hasText: "KiB" }).waitFor();
}

const submit = (page) => page.getByRole("button", { name: "Submit" }).click();
const state = (page, name) => page.getByRole("status").filter({ hasText: new RegExp(`The task (is|has) ${name}\\.`) }).waitFor();

async function expectProblem(page, code, text = code) {
  await page.getByRole("alert").filter({ hasText: text }).waitFor();
  if (!code) return;
  const link = page.getByRole("alert").getByRole("link", { name: code });
  assert.equal(new URL(await link.getAttribute("href"), page.url()).href, `${ROOT}/docs/problems#${code}`);
}

// What is shown of each kind, an option to change, and its value in the code.
const KINDS = {
  upscale: { figures: ["Before and after", "Vector image"], option: "vector", value: "true" },
  vectorize: { figures: ["Before and after", "Vector image"], option: "colors", value: "6" },
  "face-enhance": { figures: ["Before and after"] },
  seamless: { figures: ["Before and after", "Repeated 3 × 3", "Tiling by the vendor"], option: "fit", value: "0.51" },
};

for (const [kind, { figures, option, value }] of Object.entries(KINDS)) {
  test(`a task of the kind ${kind}, by keyboard`, () =>
    withPage(async (page) => {
      await setBehaviour(1);
      await open(page);
      await choose(page, kind);
      await page.getByRole("status").evaluate((status) => {
        globalThis.shown = [];
        const collect = (changes) => changes.forEach(({ addedNodes }) => addedNodes.forEach((node) => globalThis.shown.push(node.data)));
        new MutationObserver(collect).observe(status, { childList: true });
      });
      if (option) {
        await page.locator(`[name=${option}]`).focus();
        await page.keyboard.press(value === "true" ? "Space" : "ArrowRight");
      }
      await page.getByRole("button", { name: "Submit" }).focus();
      await page.keyboard.press("Enter");
      await state(page, "succeeded");
      const shown = await page.evaluate(() => [...new Set(globalThis.shown)]);
      assert.deepEqual(shown, ["Sending the picture…", "The task is queued.", "The task is running.", "The task has succeeded."]);
      await page.locator("figure").nth(figures.length - 1).waitFor();
      assert.deepEqual(await page.locator("figcaption").allTextContents(), figures);
      await page.waitForFunction(() => [...document.querySelectorAll("figure img")].every((image) => image.complete && image.naturalWidth));
      assert.match(await page.locator("#details").textContent(), /Cost\d uses?/);

      const before = page.getByRole("img", { name: "Before" });
      assert.match(await before.evaluate((image) => getComputedStyle(image).clipPath), /50%/);
      await page.getByRole("slider", { name: "Share of the picture before" }).focus();
      await page.keyboard.press("End");
      assert.match(await before.evaluate((image) => getComputedStyle(image).clipPath), /^inset\(0px(?! 50%)/);

      for (const language of ["curl", "Python", "TypeScript"]) {
        if (language !== "curl") await page.keyboard.press("ArrowRight");
        else await page.getByRole("tab", { name: "curl" }).focus();
        const code = await page.getByRole("tabpanel", { name: language }).locator("code").textContent();
        assert.ok(code.includes(language === "Python" ? `gateway.submit("${kind}"` : `/v1/tasks/${kind}`), code);
        if (option && language === "Python") assert.ok(code.includes(`${option}=${value === "true" ? "True" : value}`), code);
        assert.ok(!option || code.toLowerCase().includes(value), code);
        writeFileSync(`${FOLDER}/${kind}.${language}`, code);
      }
      await page.getByRole("button", { name: kind }).first().waitFor(); // among the recent tasks
      await assertAccessible(page);
      if (FOLDER) await page.screenshot({ path: `${FOLDER}/${kind}.png`, fullPage: true });
    }));
}

test("the token stays in memory", () =>
  withPage(async (page) => {
    const requests = [];
    page.on("request", (request) => requests.push(request.url()));
    await open(page);
    await page.getByText("tasks left of 100 tasks").waitFor();
    assert.ok(requests.every((url) => url.startsWith(ROOT) && !url.includes("igw_")));
    const left = await page.evaluate(async () => [
      ...[localStorage, sessionStorage].map((storage) => storage.length),
      document.cookie,
      (await indexedDB.databases()).length,
      location.href,
      document.documentElement.outerHTML.includes("igw_M"),
    ]);
    assert.deepEqual(left, [0, 0, "", 0, `${ROOT}/playground`, false]);
    await page.reload();
    assert.equal(await page.getByLabel("Token", { exact: true }).inputValue(), "");
  }));

test("an SVG with a script shows and does not run", () =>
  withPage(async (page) => {
    const body = `<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9" onload="parent.document.title='run'">
      <script>parent.document.title = "run"; fetch("https://elsewhere.example/")</script><rect width="9" height="9"/></svg>`;
    await page.route("**/artifacts/vector", (route) => route.fulfill({ body, contentType: "image/svg+xml" }));
    const foreign = [];
    page.on("request", (request) => /^(blob:)?http:\/\/127/.test(request.url()) || foreign.push(request.url()));
    await setBehaviour();
    await open(page);
    await choose(page, "vectorize");
    await submit(page);
    await page.waitForFunction(() => document.querySelector("img.checked")?.naturalWidth === 9);
    assert.match(await page.title(), /^Playground/);
    assert.deepEqual(foreign, []);
  }));

test("errors that the form can correct", () =>
  withPage(async (page) => {
    await setBehaviour();
    await open(page, "igw_wrong");
    await expectProblem(page, "unauthenticated");
    await page.getByLabel("Token", { exact: true }).fill(TOKEN);
    await page.getByRole("button", { name: "Connect" }).click();
    await submit(page);
    await expectProblem(page, "", "No picture");
    const { top, bottom } = await page.getByRole("alert").evaluate((alert) => alert.getBoundingClientRect().toJSON());
    assert.ok(top >= 0 && bottom <= 900, `${top} ${bottom}`); // in sight
    await page.getByLabel("Picture").setInputFiles({ name: "a.png", mimeType: "image/png", buffer: Buffer.from("%PDF-1.7") });
    await submit(page);
    await expectProblem(page, "unsupported-media-type");
    assert.ok(await page.locator("#preview").isHidden());
    await choose(page, "upscale");
    const scale = page.getByLabel("scale", { exact: true });
    await scale.evaluate((range) => Object.assign(range, { max: 99, value: 9 })); // as if the page were outdated
    await submit(page);
    await expectProblem(page, "invalid-options");
    assert.equal(await scale.getAttribute("aria-invalid"), "true");
    assert.ok(await scale.evaluate((range) => range === document.activeElement));
    await assertAccessible(page);
    await page.screenshot({ path: `${FOLDER}/invalid.png`, fullPage: true });
  }));

test("refusals and faults of the upstream", () =>
  withPage(async (page) => {
    await open(page);
    await choose(page, "face-enhance");
    await setBehaviour(0, { on: "submit", reject: "图片太小", times: 1 });
    await submit(page);
    await expectProblem(page, "upstream-rejected");
    await setBehaviour(0, { on: "submit", fail: "显存不足", times: 1 });
    await submit(page);
    await state(page, "failed");
    await expectProblem(page, "", "The task has failed");
    await assertAccessible(page);
    await setBehaviour(0, { on: "submit", reply: "reset", times: 1 });
    const before = await countSubmissions();
    await submit(page);
    await expectProblem(page, "submission-unknown");
    await submit(page); // repeats the request with the same key
    await expectProblem(page, "submission-unknown");
    assert.equal(await countSubmissions(), before + 1);
  }));

test("no connection: the repeated submission is sent once", () =>
  withPage(async (page) => {
    await setBehaviour();
    await open(page);
    await choose(page, "face-enhance");
    const before = await countSubmissions();
    const keys = [];
    await page.route("**/v1/tasks/face-enhance", async (route) => {
      keys.push(route.request().headers()["idempotency-key"]);
      if (keys.length > 1) return route.continue();
      await route.fetch(); // it arrives, and its response is lost
      return route.abort();
    });
    await submit(page);
    await expectProblem(page, "", "No response");
    await submit(page);
    await state(page, "succeeded");
    assert.equal(new Set(keys).size, 1);
    assert.equal(await countSubmissions(), before + 1);
  }));

test("limits and an empty account", () =>
  withPage(async (page) => {
    await setBehaviour();
    await open(page, LIMITED_TOKEN);
    await page.getByText("1 task left of 1 task").waitFor();
    await choose(page, "face-enhance");
    await submit(page);
    await state(page, "succeeded");
    await page.getByText("0 tasks left of 1 task").waitFor();
    await submit(page);
    await expectProblem(page, "quota-exceeded");
    await assertAccessible(page);
    await page.screenshot({ path: `${FOLDER}/limits.png`, fullPage: true });
    await open(page, POOR_TOKEN);
    await page.getByText("can't pay now").or(page.getByText("no limits")).first().waitFor();
    await choose(page, "face-enhance");
    await submit(page);
    await expectProblem(page, "balance-exhausted");
  }));

test("a recent task opens again", () =>
  withPage(async (page) => {
    await setBehaviour();
    await open(page);
    await choose(page, "seamless");
    await submit(page);
    await state(page, "succeeded");
    await open(page);
    await page.locator(".task").first().click();
    await state(page, "succeeded");
    await page.locator("figure").nth(2).waitFor();
    assert.deepEqual(await page.locator("figcaption").allTextContents(), ["Result", "Repeated 3 × 3", "Tiling by the vendor"]);
    assert.match(await page.locator("#code code").textContent(), /seamless/);
  }));

test("a result that breaks off is reported", () =>
  withPage(
    async (page) => {
      await setBehaviour();
      await open(page);
      await choose(page, "face-enhance");
      await page.evaluate(() => (Response.prototype.blob = () => Promise.reject(new TypeError("network error"))));
      await submit(page);
      await expectProblem(page, "", "No response");
    },
    { allow: /network error/ },
  ));
