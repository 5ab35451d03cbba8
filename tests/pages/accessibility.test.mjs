import { test } from "node:test";
import { ROOT, assertAccessible, withPage } from "./browser.mjs";

for (const path of process.env.PAGES.split(" ")) {
  for (const colorScheme of ["light", "dark"]) {
    test(`${path}, ${colorScheme}`, () =>
      withPage(
        async (page) => {
          await page.goto(ROOT + path);
          if (path === "/docs") await page.getByText("Client Libraries").waitFor();
          if (path === "/playground") await page.getByRole("radio").first().waitFor();
          for (const width of [320, 1280]) {
            await page.setViewportSize({ width, height: 900 });
            await assertAccessible(page);
          }
        },
        { colorScheme },
      ));
  }
}
