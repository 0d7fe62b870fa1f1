// Devices as a list, and the story of one.

import { ask } from "./api.js";
import { bytes, duration, figures, h, instant, link, replace, table, time, words } from "./dom.js";
import { listen, live } from "./live.js";

export async function devicesPage(body, { query, onLeave }) {
  const list = h("div", { "aria-live": "off" });
  const text = h("input", { id: "find", type: "search", value: query.get("text") || "", placeholder: "part of a name", oninput: later });
  const states = h("select", { id: "state", onchange: () => load() }, h("option", { value: "" }, "any state"),
    Object.keys((live.fleet && live.fleet.states) || {}).map((state) => h("option", { value: state }, words(state))));
  const filters = ["family", "version", "tier", "outcome", "code"].filter((name) => query.get(name));
  let after = "";
  replace(body, h("h1", {}, "Devices"),
    h("form", { class: "row", role: "search", onsubmit: (event) => event.preventDefault() },
      h("label", { for: "find" }, "Find"), text, h("label", { for: "state" }, "State"), states,
      filters.map((name) => h("span", { class: "chip" }, `${name} ${query.get(name)}`)),
      filters.length ? link("devices", "all") : null), list);
  let timer = 0;
  function later() { clearTimeout(timer); timer = setTimeout(load, 250); }

  async function load() {
    const asked = new URLSearchParams({ text: text.value, state: states.value, after, limit: "100" });
    filters.forEach((name) => asked.set(name, query.get(name)));
    const page = await ask(`devices?${asked}`);
    replace(list, table(`${page.total} devices`, ["Device", "Link", "Family", "Version", "State", "Last update", "Received", "Last seen"],
      page.devices.map((each) => [link(`devices/${encodeURIComponent(each.device)}`, each.device), each.is_online ? "online" : "offline", each.family,
        each.version || "–", words(each.state), each.target ? `${each.target}: ${words(each.outcome)}${each.code ? ` (${each.code})` : ""}` : "–",
        each.full_bytes ? `${bytes(each.received_bytes)} of ${bytes(each.full_bytes)}` : "–", time(each.seen_ms)]), "No device matches."),
    h("div", { class: "row" },
      after ? h("button", { type: "button", onclick: () => { after = ""; load(); } }, "First page") : null,
      page.after ? h("button", { type: "button", onclick: () => { after = page.after; load(); } }, "Next page") : null));
  }

  await load();
  let seen = live.version;
  const refresh = setInterval(() => { if (live.version !== seen && !after) { seen = live.version; load().catch(() => {}); } }, 3000);
  onLeave(() => { clearInterval(refresh); clearTimeout(timer); });
}

const PATH = ["idle", "syncing", "admitting", "downloading", "installing", "verifying", "trial", "committing"];

export async function devicePage(body, { parts: [name], onLeave }) {
  const place = h("div", {});
  replace(body, place);

  async function load() {
    const device = await ask(`devices/${encodeURIComponent(name)}`);
    const path = PATH.includes(device.state) ? PATH : [...PATH, device.state];
    replace(place, h("h1", {}, device.device),
      figures([[device.version || "nothing", device.family ? `${device.family} version that runs` : "runs"], [words(device.state), device.is_online ? "connected" : "not connected"],
        [device.target ? words(device.outcome) : "–", device.target ? `update to ${device.target}` : "no update yet"],
        [bytes(device.received_bytes), device.full_bytes ? `received, whole files: ${bytes(device.full_bytes)}` : "received"],
        [device.tier || "–", "hardware tier"]]),
      device.code ? h("p", { class: "card no" }, `${device.code}: ${device.detail}`) : null,
      h("section", { class: "card" }, h("h2", {}, "State machine"),
        h("ol", { class: "states" }, path.map((state) => h("li", { class: state === device.state ? "here" : "", "aria-current": state === device.state ? "step" : undefined },
          words(state), device.states_ms[state] ? h("span", { class: "small soft" }, ` ${duration(device.states_ms[state])}`) : null)))),
      h("section", { class: "card" }, h("h2", {}, "Story"), story(device.moments)),
      trial(device.trial),
      h("section", { class: "card" }, h("h2", {}, "What it says of itself"),
        table("As it reported last", ["What", "Value"], [["Memory", bytes(device.memory_bytes)], ["Free disk", bytes(device.disk_free_bytes)],
          ["Runtimes", Object.entries(device.runtimes).map(([runtime, version]) => `${runtime} ${version}`).join(", ") || "–"],
          ["Asked to run", device.desired_version || "–"], ["Starts of the new version", String(device.tries)],
          ["Transfers resumed", String(device.resumes)], ["Chunks: there already, invalid", `${device.redundant_chunks}, ${device.invalid_chunks}`],
          ...Object.entries(device.files).map(([file, digest]) => [file, h("code", {}, digest)])])));
  }

  await load();
  let row = JSON.stringify(live.devices.get(name));
  onLeave(listen(() => {
    const now = JSON.stringify(live.devices.get(name));
    if (now !== row) { row = now; load().catch(() => {}); }
  }));
}

function story(moments) {
  if (!moments.length) return h("p", { class: "soft" }, "Nothing happened since the server began to keep events.");
  const days = [];
  [...moments].reverse().forEach((each, index, all) => {
    const before = all[index + 1];
    days.push(h("li", { class: `o-${each.outcome || "none"}` }, time(each.at_ms), h("div", {}, happened(each, before),
      each.detail && each.code ? h("div", { class: "small soft" }, `${each.code}: ${each.detail}`) : null)));
  });
  return h("ol", { class: "story", reversed: true }, days);
}

function happened(now, before) {
  const said = [];
  if (!before || now.is_online !== before.is_online) said.push(now.is_online ? "connected" : "lost its connection");
  if ((!before || now.version !== before.version) && (now.version || before)) said.push(now.version ? `runs ${now.version}` : "runs nothing");
  if (now.rollout && (!before || now.rollout !== before.rollout)) said.push(`${now.rollout} asks for ${now.target}`);
  if (now.outcome && now.outcome !== "running" && (!before || now.outcome !== before.outcome || now.rollout !== before.rollout)) said.push(`${words(now.outcome)} ${now.target}`);
  if (now.state && now.state !== now.outcome && (!before || now.state !== before.state)) said.push(words(now.state));
  return said.join("; ") || (now.code ? now.code : "reported");
}

function trial(evidence) {
  if (!evidence) return null;
  const { latency } = evidence;
  return h("section", { class: "card" }, h("h2", {}, "Trial"), figures([
    [`${evidence.prompts_passed} / ${evidence.prompts_total}`, "golden prompts passed"],
    [evidence.load_ms === null ? "–" : duration(evidence.load_ms), "to load"],
    [latency ? `${latency.p50_ms.toFixed(1)} / ${latency.p95_ms.toFixed(1)} / ${latency.p99_ms.toFixed(1)} ms` : "–", "latency p50 / p95 / p99"],
    [evidence.memory_peak_bytes === null ? "–" : bytes(evidence.memory_peak_bytes), "peak memory"],
  ]), evidence.detail ? h("p", {}, evidence.detail) : null);
}
