// The controls of a kind's options.

import { element } from "./dom.js";

export function renderOptions(fieldset, options) {
  const legend = element("legend", {}, "Options");
  const fields = options.map(renderField);
  fieldset.replaceChildren(legend, ...(fields.length ? fields : [element("p", { className: "hint" }, "This kind has none.")]));
}

// Return the values that differ from their defaults, as a form has them.
export function readOptions(fieldset) {
  const values = {};
  for (const control of fieldset.querySelectorAll("[name]")) {
    const value = control.type === "checkbox" ? String(control.checked) : control.value;
    if (value !== control.dataset.default) values[control.name] = value;
  }
  return values;
}

// Show an error beside each faulty control, and move the focus to the first one.
export function showErrors(fieldset, errors) {
  clearErrors(fieldset);
  let first = null;
  for (const { field, detail } of errors) {
    const control = fieldset.querySelector(`[name="${CSS.escape(field)}"]`);
    if (!control) continue;
    const error = element("p", { className: "error", id: `${control.id}-error` }, detail);
    control.closest(".field").append(error);
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("aria-describedby", `${error.id} ${control.id}-hint`);
    first ??= control;
  }
  first?.focus();
}

export function clearErrors(fieldset) {
  for (const error of fieldset.querySelectorAll(".error")) error.remove();
  for (const control of fieldset.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    control.setAttribute("aria-describedby", `${control.id}-hint`);
  }
}

function renderField(option) {
  const id = `option-${option.name}`;
  const label = element("label", { htmlFor: id }, option.name.replaceAll("_", " "));
  const hint = element("p", { className: "hint", id: `${id}-hint` }, option.description ?? "");
  const control = renderControl(option);
  control.id = id;
  control.name = option.name;
  control.setAttribute("aria-describedby", hint.id);
  if (control.type === "checkbox") return element("div", { className: "field check" }, control, label, hint);
  if (control.type !== "range") return element("div", { className: "field" }, label, control, hint);
  // Screen readers announce the value of the slider itself.
  const output = element("span", { className: "value", "aria-hidden": "true" }, control.value);
  control.addEventListener("input", () => (output.textContent = control.value));
  return element("div", { className: "field" }, element("div", { className: "row" }, label, output), control, hint);
}

function renderControl(option) {
  const initial = String(option.default ?? "");
  const dataset = (made) => Object.assign(made.dataset, { default: initial }) && made;
  if (option.type === "boolean") return dataset(element("input", { type: "checkbox", checked: option.default === true }));
  if (option.minimum !== undefined && option.maximum !== undefined) {
    const { minimum: min, maximum: max } = option;
    const step = option.type === "integer" ? 1 : 10 ** Math.floor(Math.log10((max - min) / 50));
    const range = element("input", { type: "range" });
    Object.assign(range, { min, max, step: String(+step.toPrecision(1)), value: initial });
    range.dataset.default = range.value;
    return range;
  }
  const choices = option.enum ?? option.examples;
  if (choices) {
    const select = element("select", {}, ...choices.map((name) => element("option", { value: name }, name)));
    select.value = initial;
    return dataset(select);
  }
  return dataset(element("textarea", { rows: 2, maxLength: option.maxLength ?? 2000, value: initial }));
}
