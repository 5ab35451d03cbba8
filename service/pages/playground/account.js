// Remaining quota, cost, and recent tasks.

import { readJson } from "./api.js";
import { byId, element, formatCount, formatMoney, formatTime } from "./dom.js";

const UNITS = {
  tasks: (amount) => formatCount(amount, "task"),
  money: formatMoney,
};
const WINDOWS = { minute: "in this minute", hour: "in this hour", day: "today", month: "in this month", total: "in total" };

// Read all of it; `onOpen` is called with the task that is chosen from the list. Raises a Problem.
export async function refresh(onOpen) {
  const [quota, usage, tasks] = await Promise.all([
    readJson("v1/quota"),
    readJson("v1/usage?interval=month&group_by=kind"),
    readJson("v1/tasks?limit=10"),
  ]);
  byId("quota").replaceChildren(...renderQuota(quota));
  byId("usage").replaceChildren(...renderUsage(usage));
  const list = element("ul", { className: "tasks" });
  byId("recent").replaceChildren(tasks.items.length ? list : hint("There are none yet."));
  appendTasks(list, tasks, onOpen);
}

function appendTasks(list, page, onOpen) {
  list.append(...page.items.map((task) => element("li", {}, renderTask(task, onOpen))));
  if (!page.next_cursor) return;
  const more = element("button", { type: "button" }, "Older tasks");
  more.addEventListener("click", async () => {
    more.disabled = true;
    const next = await readJson(`v1/tasks?limit=10&cursor=${encodeURIComponent(page.next_cursor)}`);
    more.remove();
    appendTasks(list, next, onOpen);
  });
  list.after(more);
}

function renderTask(task, onOpen) {
  const button = element(
    "button",
    { type: "button", className: "task" },
    element("strong", {}, task.kind),
    element("span", { className: `state ${task.state}` }, task.state),
    element("span", { className: "hint" }, `${formatTime(task.created_at)} · ${formatCost(task.cost)}`),
  );
  button.addEventListener("click", () => onOpen(task));
  return button;
}

export function formatCost({ count, money, basis }) {
  if (basis === "unknown") return "cost not known";
  const parts = [count ? formatCount(count, "use") : null, money ? formatMoney(money) : null].filter(Boolean);
  return `${parts.join(" and ") || "no cost"}${basis === "estimated" ? ", estimated" : ""}`;
}

function renderQuota({ policies, account }) {
  const bars = policies.map((policy) => {
    const format = UNITS[policy.unit] ?? ((amount) => amount.toLocaleString());
    const share = (amount) => (policy.limit ? amount / policy.limit : 1);
    const left = `${format(policy.remaining)} left of ${format(policy.limit)}`;
    const held = policy.reserved ? `, ${format(policy.reserved)} held` : "";
    const reset = policy.resets_at ? `, resets ${formatTime(policy.resets_at)}` : "";
    const title = policy.unit === "active" ? "Active tasks" : `${policy.unit === "money" ? "Money" : "Tasks"} ${WINDOWS[policy.window]}`;
    return renderBar(title, `${left}${held}${reset}`, share(policy.used), { held: share(policy.reserved), isLimit: true });
  });
  const empty = policies.length ? [] : [hint("This token has no limits.")];
  const pays = account.can_pay
    ? []
    : [element("p", { className: "notice bad" }, "The account at the vendor can't pay now. ", account.look_again_at ? `It is looked at again ${formatTime(account.look_again_at)}.` : "")];
  return [...pays, ...bars, ...empty];
}

function renderUsage({ items, total }) {
  const amount = ({ spent }) => ({
    count: spent.observed.count + spent.estimated.count,
    money: spent.observed.money + spent.estimated.money,
  });
  const highest = Math.max(...items.map((item) => item.charged.tasks), 1);
  const bars = items.map((item) => {
    const { count, money } = amount(item);
    return renderBar(item.kind, describe(item.charged.tasks, count, money), item.charged.tasks / highest);
  });
  if (!items.length) return [hint("Nothing was charged in this month.")];
  const { count, money } = amount(total);
  return [...bars, element("p", {}, element("strong", {}, "Total: "), describe(total.charged.tasks, count, money))];
}

const describe = (tasks, count, money) => `${formatCount(tasks, "task")}, ${formatCount(count, "use")}, ${formatMoney(money)}`;

function renderBar(title, text, share, { held = 0, isLimit = false } = {}) {
  // The text beside it has the figures, also for screen readers.
  const part = (width, name) => element("span", { className: name, style: { width: `${Math.min(100 * width, 100)}%` } });
  return element(
    "div",
    { className: "quota" },
    element("div", { className: "row" }, element("span", {}, title), element("span", { className: "hint" }, text)),
    element(
      "div",
      { className: isLimit && share + held >= 0.9 ? "meter high" : "meter", "aria-hidden": "true" },
      part(share, "used"),
      part(held, "held"),
    ),
  );
}

const hint = (text) => element("p", { className: "hint" }, text);
