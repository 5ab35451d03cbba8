// Builds elements. Text is always set as text, so that nothing of a response becomes markup.

export function element(name, properties = {}, ...children) {
  const { style, ...rest } = properties;
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(rest)) {
    if (key in made && !key.startsWith("aria")) made[key] = value;
    else made.setAttribute(key, value);
  }
  for (const [key, value] of Object.entries(style ?? {})) made.style.setProperty(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const byId = (id) => document.getElementById(id);

export const formatTime = (text) =>
  new Date(text).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

export const formatMoney = (yuan) => `¥${yuan.toLocaleString(undefined, { maximumFractionDigits: 2 })}`;

export const formatCount = (count, noun) => `${count.toLocaleString()} ${noun}${count === 1 ? "" : "s"}`;
