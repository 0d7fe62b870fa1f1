// The fleet at a glance: figures, every device as a cell, versions, rollouts.

import { bytes, figures, h, link, percent, replace, statusBar, words } from "./dom.js";
import { listen, live } from "./live.js";

export const KINDS = [
  ["trouble", "took it back or failed"], ["trial", "tries a new version"], ["moving", "fetches or installs"],
  ["target", "updated"], ["idle", "at rest"], ["offline", "not connected"],
];
const MOVING = new Set(["syncing", "admitting", "downloading", "installing", "verifying", "committing", "suspended"]);

export function kindOf([, isOnline, , version, state, target, outcome]) {
  if (state === "trial") return "trial";
  if (["rolled_back", "failed"].includes(outcome) || ["rolling_back"].includes(state)) return isOnline ? "trouble" : "offline";
  if (!isOnline) return "offline";
  if (MOVING.has(state) && outcome === "running") return "moving";
  return outcome === "committed" && version === target ? "target" : "idle";
}

export function fleetPage(body, { onLeave }) {
  const facts = h("div", {});
  const canvas = h("canvas", { role: "img" });
  const pointed = h("p", { class: "small soft" }, "Point at a cell to see whose it is; the list of devices shows the same.");
  const legend = h("div", { class: "legend" });
  const versions = h("div", {});
  const rollouts = h("div", {});
  const grid = fleetGrid(canvas, pointed);
  replace(body, h("h1", {}, "Fleet"), facts,
    h("section", { class: "card" }, h("h2", {}, "Devices"), legend, canvas, pointed, h("p", {}, link("devices", "All devices as a list"))),
    h("section", { class: "card" }, h("h2", {}, "Versions"), versions),
    h("section", { class: "card" }, h("h2", {}, "Rollouts"), rollouts));
  let shownFleet = null;

  function draw() {
    const counts = grid.draw();
    replace(legend, KINDS.map(([kind, text]) => h("span", {}, h("i", { class: `k-${kind}` }), h("b", {}, String(counts[kind] || 0)), ` ${text}`)));
    canvas.setAttribute("aria-label", `Devices: ${KINDS.map(([kind, text]) => `${counts[kind] || 0} ${text}`).join(", ")}`);
    const fleet = live.fleet;
    if (!fleet || fleet === shownFleet) return;
    shownFleet = fleet;
    const { air } = fleet;
    replace(facts, figures([
      [String(fleet.devices), "devices"], [`${fleet.online}`, "connected"],
      [bytes(air.received_bytes), air.full_bytes ? `over the air, whole files: ${bytes(air.full_bytes)}` : "over the air"],
      [air.saved_share === null ? "–" : percent(Math.max(0, air.saved_share)), "bytes saved by deltas"],
      [fleet.is_connected ? "connected" : "not connected", `broker ${fleet.broker}`],
    ]));
    const most = Math.max(1, ...fleet.versions.map((each) => each.devices));
    replace(versions, fleet.versions.length ? h("ul", { class: "bars" }, fleet.versions.map((each) => {
      const bar = h("i", {});
      bar.style.width = `${(100 * each.devices) / most}%`;
      return h("li", {}, link(`devices?family=${encodeURIComponent(each.family)}&version=${encodeURIComponent(each.version)}`,
        `${each.family} ${each.version || "(nothing)"}`.trim()), h("span", { class: "track" }, bar), h("b", {}, String(each.devices)));
    })) : h("p", { class: "soft" }, "No device has reported yet."));
    replace(rollouts, fleet.rollouts.length ? fleet.rollouts.slice(0, 8).map((each) =>
      h("article", { class: "line" }, h("h3", {}, link(`rollouts/${each.id}`, `${each.id}: ${each.family} ${each.version}`), " ",
        h("span", { class: `chip r-${each.state}` }, words(each.state))),
      each.reason ? h("p", { class: "small" }, each.reason) : null, statusBar(each.counts, each.id)))
      : h("p", { class: "soft" }, "No rollout yet. ", link("releases", "Choose a release"), " to start one."));
  }

  onLeave(listen(draw));
  const onSize = () => { grid.reset(); draw(); };
  window.addEventListener("resize", onSize);
  window.addEventListener("theme", onSize);
  onLeave(() => { window.removeEventListener("resize", onSize); window.removeEventListener("theme", onSize); });
  draw();
}

// Cells in the order of the devices' names; only those that changed are painted again.
function fleetGrid(canvas, pointed) {
  let names = [];
  let painted = new Map();
  let geometry = null;
  let colours = {};

  function reset() { geometry = null; painted = new Map(); }

  function layOut() {
    const box = getComputedStyle(canvas.parentElement);
    const width = canvas.parentElement.clientWidth - parseFloat(box.paddingLeft) - parseFloat(box.paddingRight);
    const size = Math.max(4, Math.min(18, Math.floor(Math.sqrt((width * 260) / Math.max(1, names.length)))));
    const columns = Math.max(1, Math.floor(width / size));
    const rows = Math.max(1, Math.ceil(names.length / columns));
    const scale = window.devicePixelRatio || 1;
    canvas.width = columns * size * scale;
    canvas.height = rows * size * scale;
    canvas.style.width = `${columns * size}px`;
    canvas.style.height = `${rows * size}px`;
    const style = getComputedStyle(document.documentElement);
    colours = Object.fromEntries(KINDS.map(([kind]) => [kind, style.getPropertyValue(`--k-${kind}`)]));
    geometry = { size, columns, scale };
  }

  function draw() {
    if (names.length !== live.devices.size) {
      names = [...live.devices.keys()].sort();
      reset();
    }
    if (!geometry) layOut();
    const { size, columns, scale } = geometry;
    const context = canvas.getContext("2d");
    const counts = {};
    context.setTransform(scale, 0, 0, scale, 0, 0);
    names.forEach((name, index) => {
      const kind = kindOf(live.devices.get(name));
      counts[kind] = (counts[kind] || 0) + 1;
      if (painted.get(name) === kind) return;
      painted.set(name, kind);
      const x = (index % columns) * size;
      const y = Math.floor(index / columns) * size;
      context.clearRect(x, y, size, size);
      context.fillStyle = colours[kind];
      context.fillRect(x + 0.5, y + 0.5, size - 1.5, size - 1.5);
    });
    return counts;
  }

  function at(event) {
    if (!geometry) return undefined;
    const box = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / geometry.size);
    return names[Math.floor((event.clientY - box.top) / geometry.size) * geometry.columns + column];
  }

  canvas.addEventListener("mousemove", (event) => {
    const name = at(event);
    const row = name && live.devices.get(name);
    if (row) pointed.textContent = `${name}: ${words(row[4] || "unknown")}, runs ${row[3] || "nothing"}${row[7] ? `, ${row[7]}` : ""}${row[1] ? "" : ", not connected"}`;
  });
  canvas.addEventListener("click", (event) => { const name = at(event); if (name) location.hash = `#/devices/${encodeURIComponent(name)}`; });
  return { draw, reset };
}
