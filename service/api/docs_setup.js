// The validation library in the viewer would otherwise try `eval`, which the page's policy forbids and reports.
globalThis.__zod_globalConfig = { jitless: true };

addEventListener("DOMContentLoaded", () => {
  Scalar.createApiReference("#viewer", {
    url: "openapi.json",
    // Nothing comes from or goes to another host, and no services of the viewer's authors are offered.
    withDefaultFonts: false,
    telemetry: false,
    agent: { disabled: true },
    mcp: { disabled: true },
    hideClientButton: true,
    showDeveloperTools: "never",
    // The colours are those of the other pages (style.css), which follow the system.
    hideDarkModeToggle: true,
  });
});
