// Who did what, where alerts go, and which ones were told.

import { ask, may } from "./api.js";
import { h, link, replace, table, time, words } from "./dom.js";

const PAGE = 100;
const MARKS = { "rollout.stopped": "d-stop", "rollout.paused": "d-stop", "rollout.completed": "d-finish" };

export async function auditPage(body, { query, onLeave }) {
  if (!may("approver")) return replace(body, h("h1", {}, "Audit"), h("p", {}, "Who did what is shown to approvers."));
  const who = h("input", { id: "who", type: "search", value: query.get("who") || "", placeholder: "name, or server", maxlength: 128, oninput: later });
  const what = h("input", { id: "what", type: "search", value: query.get("what") || "", placeholder: "rollout, user.add, …", maxlength: 128, oninput: later });
  const list = h("div", { "aria-live": "off" });
  const hooks = h("div", {});
  replace(body, h("h1", {}, "Audit"),
    h("form", { class: "row", role: "search", onsubmit: (event) => event.preventDefault() },
      h("label", { for: "who" }, "Who"), who, h("label", { for: "what" }, "What"), what), list, hooks);
  let before = null;
  let timer = 0;
  function later() { clearTimeout(timer); timer = setTimeout(() => { before = null; load(); }, 250); }

  async function load() {
    const asked = new URLSearchParams({ who: who.value, what: what.value, limit: PAGE });
    if (before) asked.set("before", before);
    const page = await ask(`audit?${asked}`);
    replace(list, h("section", { class: "card audit" }, table("Acts, newest first", ["When", "Who", "What", "On", "Outcome"],
      page.records.map((each) => [time(each.at_ms), actor(each), h("code", {}, each.what), each.on, outcome(each)]), "Nothing is noted that matches.")),
    h("div", { class: "row" },
      before ? h("button", { type: "button", onclick: () => { before = null; load(); } }, "Newest") : null,
      page.before ? h("button", { type: "button", onclick: () => { before = page.before; load(); } }, "Older") : null));
  }

  await load();
  const webhooks = await ask("webhooks");
  replace(hooks, h("section", { class: "card" }, h("h2", {}, "Webhooks"),
    table("Where alerts go", ["Name", "To", "Events", "Wait", "Sent", "Dropped", "Failed last"], webhooks.map((each) => [each.name, each.url, each.events.join(", "),
      String(each.waiting), String(each.delivered), String(each.dropped), each.failed ? [time(each.failed.tried_ms), h("div", { class: "small no" }, each.failed.error)] : "–"]),
    "No webhook is set.")));
  onLeave(() => clearTimeout(timer));
}

function actor(each) {
  if (each.kind === "server") return "the server";
  const how = { page: "", token: "by token", command: "by command", device: "the device" }[each.kind];
  return [each.name || "somebody", h("div", { class: "small soft" }, [each.role, how, each.address].filter(Boolean).join(", "))];
}

function outcome(each) {
  const facts = Object.entries(each.details).filter(([, value]) => value !== "");
  return [each.outcome === "done" ? null : h("span", { class: each.outcome === "waiting" ? "chip" : "chip r-stopped" }, each.outcome), each.text ? h("div", {}, each.text) : null,
    facts.length ? h("div", { class: "small soft" }, facts.map(([name, value]) => `${words(name)} ${value}`).join(", ")) : null];
}

// What was told about a rollout, and whether it has arrived: looked at again while the page is shown.
export async function followAlerts(place, about, onLeave) {
  let shown = "";
  async function load() {
    const alerts = await ask(`alerts?about=${encodeURIComponent(about)}`);
    const now = JSON.stringify(alerts);
    if (now !== shown) { shown = now; replace(place, alertList(alerts)); }  // a link that has the focus stays
  }
  await load();
  const timer = setInterval(() => load().catch(() => {}), 3000);
  onLeave(() => clearInterval(timer));
}

function alertList(alerts) {
  return h("section", { class: "card", id: "alerts" }, h("h2", {}, "Alerts"), alerts.length ? h("ol", { class: "story", reversed: true }, alerts.map((each) =>
    h("li", { class: MARKS[each.kind] || (each.count ? "d-stop" : "d-widen") }, time(each.at_ms), h("div", {}, h("b", {}, each.kind), `: ${each.text}`,
      each.count ? h("div", { class: "small" }, each.devices.flatMap((name, index) => [index ? ", " : null, link(`devices/${encodeURIComponent(name)}`, name)]),
        each.count > each.devices.length ? ` and ${each.count - each.devices.length} more` : null) : null,
      h("div", { class: "small soft" }, each.deliveries.length ? each.deliveries.map(arrived).join("; ") : "no webhook asks for it"))))) : h("p", { class: "soft" }, "None yet."));
}

function arrived(delivery) {
  const tries = delivery.attempts > 1 ? ` after ${delivery.attempts} attempts` : "";
  if (delivery.state === "delivered") return `sent to ${delivery.webhook}${tries}`;
  return `${delivery.state === "dropped" ? "given up for" : "waits for"} ${delivery.webhook}${delivery.error ? `: ${delivery.error}` : ""}`;
}
