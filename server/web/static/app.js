// Which page is shown, who is signed in, and what stands around the pages.

import { ask, may, visitor } from "./api.js";
import { h, link, replace } from "./dom.js";
import { connect, disconnect, listen, live } from "./live.js";
import { devicePage, devicesPage } from "./devices.js";
import { fleetPage } from "./fleet.js";
import { releasePage, releasesPage } from "./releases.js";
import { rolloutPage, rolloutsPage } from "./rollouts.js";
import { signInPage } from "./signin.js";
import { tiersPage } from "./tiers.js";
import { auditPage } from "./trail.js";

const PAGES = [
  [/^$/, fleetPage, "Fleet"],
  [/^rollouts$/, rolloutsPage, "Rollouts"],
  [/^rollouts\/([^/]+)$/, rolloutPage, "Rollout"],
  [/^devices$/, devicesPage, "Devices"],
  [/^devices\/([^/]+)$/, devicePage, "Device"],
  [/^tiers$/, tiersPage, "Tiers"],
  [/^releases$/, releasesPage, "Releases"],
  [/^releases\/([^/]+)\/([^/]+)$/, releasePage, "Release"],
  [/^audit$/, auditPage, "Audit"],
];
const view = document.getElementById("view");
let leave = () => {};

export function say(text, isBad = false) {
  const said = document.getElementById("said");
  said.textContent = text;
  said.className = `said shown ${isBad ? "bad" : ""}`;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { said.className = "said"; }, 8000);
}

export function confirmed(title, text, action) {
  const dialog = document.getElementById("ask");
  document.getElementById("ask-title").textContent = title;
  document.getElementById("ask-text").textContent = text;
  document.getElementById("ask-yes").textContent = action;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

// A page gets an element to fill and a function that says what is to be undone when it is left.
async function show() {
  leave();
  const undo = [];
  let isLeft = false;
  leave = () => { isLeft = true; undo.forEach((each) => each()); };
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const found = PAGES.map(([pattern, page, title]) => [path.match(pattern), page, title]).find(([match]) => match);
  const body = h("div", {});
  replace(view, body);
  if (!visitor.user) return signInPage(body, begin);
  navigation(path);
  if (!found) return replace(body, h("h1", {}, "There is no such page"), link("", "To the fleet"));
  const [match, page, title] = found;
  document.title = `${title} ${match.slice(1).map(decodeURIComponent).join(" ")} – Whimbrel`;
  try {
    await page(body, { parts: match.slice(1).map(decodeURIComponent), query: new URLSearchParams(query),
      onLeave: (each) => (isLeft ? each() : undo.push(each)), say, confirmed });
  } catch (error) {
    replace(body, h("h1", {}, "This cannot be shown"), h("p", { role: "alert" }, error.message), link("", "To the fleet"));
  }
  view.focus({ preventScroll: true });
}

function navigation(path) {
  const first = path.split("/")[0];
  const pages = [
    ["", "Fleet"], ["rollouts", "Rollouts"], ["devices", "Devices"], ["tiers", "Tiers"], ["releases", "Releases"],
    ...(may("approver") ? [["audit", "Audit"]] : []),
  ];
  replace(document.getElementById("nav"), pages.map(([to, text]) =>
    h("a", { href: `#/${to}`, "aria-current": to === first ? "page" : undefined }, text)));
  document.getElementById("fleet-name").textContent = visitor.fleet;
  document.getElementById("who").textContent = `${visitor.user}, ${visitor.role}`;
  document.getElementById("bar").hidden = false;
}

function showLink() {
  const element = document.getElementById("link");
  const [text, kind] = !live.isConnected ? ["no live updates", "off"]
    : live.fleet && !live.fleet.is_connected ? ["server has no broker", "off"] : ["live", "on"];
  if (element.textContent !== text) { element.textContent = text; element.className = `link ${kind}`; }
}

async function begin() {
  const found = await ask("session");
  if (!found) return end();  // nobody is signed in
  Object.assign(visitor, found);
  connect();
  await show();
}

function end() {
  Object.assign(visitor, { user: "", role: "", csrf: "" });
  disconnect();
  document.getElementById("bar").hidden = true;
  show();
}

document.getElementById("sign-out").addEventListener("click", async () => {
  try { await ask("session", { method: "DELETE" }); } finally { end(); }
});
document.getElementById("theme").addEventListener("click", () => {
  const isDark = getComputedStyle(document.documentElement).getPropertyValue("--is-dark").trim() === "1";
  const theme = isDark ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
  window.dispatchEvent(new Event("theme"));
});
const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
listen(showLink);
window.addEventListener("hashchange", show);
window.addEventListener("signed-out", end);
try { await begin(); } catch { end(); }
export { may };
