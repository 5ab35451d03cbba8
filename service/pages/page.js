// Completes a page: the address of this gateway in its commands, and a button that copies each block.

const EXAMPLE = "http://127.0.0.1:8080";
const root = new URL(document.querySelector(".brand").getAttribute("href").replace(/docs$/, "."), location);
const address = root.href.replace(/\/$/, "");

for (const block of document.querySelectorAll("main pre > code")) {
  for (const part of [block, ...block.querySelectorAll("span")]) {
    for (const node of part.childNodes) {
      if (node.nodeType === Node.TEXT_NODE) node.data = node.data.replaceAll(EXAMPLE, address);
    }
  }
  if (!navigator.clipboard) continue; // only pages by HTTPS or of this machine have one
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.textContent.trimEnd());
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  const frame = document.createElement("div");
  frame.className = "copyable";
  const pre = block.parentElement;
  pre.replaceWith(frame);
  frame.append(pre, button);
}
