// The results of a task: before and after, the vector image, the tiling.

import { call } from "./api.js";
import { element } from "./dom.js";

const TITLES = { image: "Result", vector: "Vector image", grid: "Tiling by the vendor" };
let addresses = [];

export function clearResults(container) {
  for (const address of addresses) URL.revokeObjectURL(address);
  addresses = [];
  container.replaceChildren();
}

// Fetch and show all results; `picture` is what was sent, if this tab has it.
export async function showResults(container, task, picture) {
  const results = await Promise.all(
    task.artifacts.map(async ({ name, href }) => ({ name, blob: await (await call(href)).blob() })),
  );
  clearResults(container);
  for (const { name, blob } of results) {
    const address = keep(blob);
    const file = `${task.kind}-${name}.${extension(blob.type)}`;
    const size = `${Math.max(1, Math.round(blob.size / 1024)).toLocaleString()} KiB`;
    const link = element("p", { className: "hint" }, element("a", { href: address, download: file }, `Save ${file}`), `, ${size}`);
    if (name === "image" && picture) {
      container.append(renderFigure("Before and after", renderComparison(keep(picture), address), link));
    } else {
      // As an image, an SVG can neither run scripts nor load anything.
      const image = element("img", { src: address, alt: `The result ${name}`, className: name === "vector" ? "checked" : "" });
      container.append(renderFigure(TITLES[name] ?? name, image, link));
    }
    if (name === "image" && task.kind === "seamless") container.append(renderFigure("Repeated 3 × 3", renderTiling(address)));
  }
}

function keep(blob) {
  const address = URL.createObjectURL(blob);
  addresses.push(address);
  return address;
}

const extension = (type) => ({ "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/svg+xml": "svg" })[type] ?? "bin";

function renderFigure(title, ...content) {
  return element("figure", {}, element("figcaption", {}, title), ...content);
}

function renderComparison(before, after) {
  const frame = element("div", { className: "compare", style: { "--position": "50%" } });
  const slider = element("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Share of the picture before" });
  slider.addEventListener("input", () => frame.style.setProperty("--position", `${slider.value}%`));
  frame.append(
    element("img", { src: after, alt: "After" }),
    element("img", { src: before, alt: "Before", className: "before" }),
    element("span", { className: "handle" }),
    element("span", { className: "tag left", "aria-hidden": "true" }, "before"),
    element("span", { className: "tag right", "aria-hidden": "true" }, "after"),
    slider,
  );
  return frame;
}

function renderTiling(address) {
  const tiling = element("div", { className: "tiling", role: "img", "aria-label": "The result, repeated three by three" });
  tiling.style.backgroundImage = `url("${address}")`;
  const image = new Image();
  image.onload = () => (tiling.style.aspectRatio = `${image.naturalWidth} / ${image.naturalHeight}`);
  image.src = address;
  return tiling;
}
