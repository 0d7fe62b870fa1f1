// Rollouts as a list, and one with its waves and devices, live.

import { ask, may, post } from "./api.js";
import { bytes, h, link, replace, statusBar, table, time, words } from "./dom.js";
import { listen, live } from "./live.js";

const FINAL = new Set(["finished", "stopped"]);

export async function rolloutsPage(body, { onLeave, say }) {
  const list = h("div", {});
  replace(body, h("h1", {}, "Rollouts"), may("operator") ? await startForm(say) : null, list);
  async function load() {
    const all = await ask("rollouts");
    replace(list, all.length ? all.map((each) => h("article", { class: "card" },
      h("h2", {}, link(`rollouts/${each.id}`, `${each.id}: ${each.family} ${each.version}`), " ", h("span", { class: `chip r-${each.state}` }, words(each.state))),
      each.reason ? h("p", {}, each.reason) : null,
      statusBar(each.counts, each.id),
      h("p", { class: "small soft" }, "created ", time(each.created_ms), each.finished_ms ? [", ended ", time(each.finished_ms)] : null)))
      : h("p", { class: "soft" }, "No rollout yet."));
  }
  await load();
  onLeave(whenChanged(() => live.fleet && live.fleet.rollouts, load));
}

async function startForm(say) {
  const releases = (await ask("releases")).filter((each) => each.state === "published");
  const release = h("select", { id: "release" }, releases.map((each) => h("option", { value: `${each.family}/${each.version}` }, `${each.family} ${each.version}`)));
  const canary = h("input", { id: "canary", type: "number", min: 1, value: 2 });
  const timeout = h("input", { id: "timeout", type: "number", min: 1, value: 3600 });
  const failures = h("input", { id: "failures", type: "number", min: 0, value: 0 });
  return h("form", { class: "card", onsubmit: submit }, h("h2", {}, "Start a rollout"),
    releases.length ? h("div", { class: "fields" }, h("label", { for: "release" }, "Release", release), h("label", { for: "canary" }, "Canaries", canary),
      h("label", { for: "timeout" }, "Seconds a device may take", timeout), h("label", { for: "failures" }, "Failures accepted in a wave", failures),
      h("button", { class: "main" }, "Start")) : h("p", { class: "soft" }, "No release is published."));

  async function submit(event) {
    event.preventDefault();
    const [family, version] = release.value.split("/");
    try {
      const made = await post("rollouts", { family, version, canary_count: Number(canary.value), wave_timeout_s: Number(timeout.value), failures_max: Number(failures.value) });
      say(`Rollout ${made.id} of ${family} ${version} has started`);
      location.hash = `#/rollouts/${made.id}`;
    } catch (error) {
      say(error.message, true);
    }
  }
}

export async function rolloutPage(body, { parts: [id], onLeave }) {
  const place = h("div", {});
  const status = h("select", { id: "status", onchange: () => load() }, h("option", { value: "" }, "all"),
    ["committed", "running", "asked", "rejected", "rolled_back", "failed", "silent", "withdrawn"].map((each) => h("option", { value: each }, words(each))));
  const members = h("div", {});
  replace(body, place, h("section", { class: "card" }, h("h2", {}, "Devices"), h("p", {}, h("label", { for: "status" }, "Show "), status), members));
  let isLoading = false;

  async function load() {
    if (isLoading) return;
    isLoading = true;
    try {
      draw(await ask(`rollouts/${encodeURIComponent(id)}?limit=200&status=${status.value}`));
    } finally {
      isLoading = false;
    }
  }

  function draw(rollout) {
    replace(place, h("h1", {}, `${rollout.id}: ${rollout.family} ${rollout.version} `, h("span", { class: `chip r-${rollout.state}` }, words(rollout.state))),
      rollout.reason ? h("p", { class: "card no", role: "status" }, rollout.reason) : null,
      h("p", { class: "soft" }, "created ", time(rollout.created_ms), rollout.begun_ms ? [", first device asked ", time(rollout.begun_ms)] : null,
        rollout.finished_ms ? [", ended ", time(rollout.finished_ms)] : null, ". ", link(`releases/${encodeURIComponent(rollout.family)}/${encodeURIComponent(rollout.version)}`, "The release")),
      h("section", { class: "card" }, h("h2", {}, "Waves"), Object.entries(rollout.waves).map(([wave, counts]) => h("div", {}, h("h3", {}, words(wave)), statusBar(counts, words(wave)))),
        Object.keys(rollout.waves).length ? null : h("p", { class: "soft" }, "No device was asked yet.")),
      Object.keys(rollout.codes).length ? h("section", { class: "card" }, h("h2", {}, "Why devices did not commit"),
        table("Reasons", ["Code", "Devices"], Object.entries(rollout.codes).map(([code, count]) => [h("code", {}, code), String(count)]))) : null);
    replace(members, table(`${rollout.members_total} devices`, ["Device", "Wave", "Status", "Received", "Reason"], rollout.members.map((each) => [
      link(`devices/${encodeURIComponent(each.device)}`, each.device), words(each.wave), h("span", { class: `chip s-${each.status}` }, words(each.status)),
      each.full_bytes ? `${bytes(each.received_bytes)} of ${bytes(each.full_bytes)}` : "–", each.code ? `${each.code} ${each.detail}` : "–"]), "No device."));
  }

  await load();
  onLeave(whenChanged(() => live.version, load));
}

// Calls `load` when `key` has another value, at most once a second.
function whenChanged(key, load) {
  let seen = JSON.stringify(key());
  const timer = setInterval(() => {
    const now = JSON.stringify(key());
    if (now !== seen) { seen = now; load().catch(() => {}); }
  }, 1000);
  return () => clearInterval(timer);
}

export { FINAL, listen };
