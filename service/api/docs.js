"use strict";

// Puts the reader's own address and token into the examples. Both stay in this page.
function fill(name, variable, text) {
  const quotable = text.trim().replace(/[\\"$`]/g, "\\$&");
  for (const node of document.querySelectorAll(`[data-fill="${name}"]`)) {
    node.textContent = quotable || variable;
  }
}

const origin = document.getElementById("origin");
const token = document.getElementById("token");
const fillOrigin = () => fill("origin", "$GATEWAY", origin.value.replace(/\/+\s*$/, ""));
origin.value = new URL(".", location.href).href.replace(/\/+$/, "");
origin.addEventListener("input", fillOrigin);
token.addEventListener("input", () => fill("token", "$TOKEN", token.value));
fillOrigin();
document.querySelector(".fill").hidden = false;

// Browsers lend the clipboard only to pages that came over TLS or from this machine; a selection can be copied anywhere.
async function copy(code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
    getSelection().removeAllRanges();
  }
}

for (const button of document.querySelectorAll("figcaption button")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await copy(button.closest("figure").querySelector("code"));
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

// Shows in the contents where the reader is.
const links = new Map([...document.querySelectorAll("nav li a")].map((link) => [link.hash.slice(1), link]));
const watch = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    links.get(target.id).setAttribute("aria-current", isIntersecting ? "location" : "false");
  }
}, { rootMargin: "-20% 0px -75% 0px" });
for (const place of links.keys()) {
  watch.observe(document.getElementById(place));
}

if (matchMedia("(max-width: 60rem)").matches) {
  document.querySelector("nav details").open = false;
}
