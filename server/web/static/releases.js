// Releases as a list, and one with its files, the deltas that lead to it, and where it comes from.

import { ask, may, post } from "./api.js";
import { bytes, figures, h, link, percent, replace, table, time, words } from "./dom.js";
import { comparison, tradeoffs } from "./tradeoffs.js";

export async function releasesPage(body) {
  const releases = await ask("releases");
  replace(body, h("h1", {}, "Releases"), table(`${releases.length} releases`, ["Release", "Runtime", "Size", "State", "Devices", "Added"],
    releases.map((each) => [link(path(each), `${each.family} ${each.version}`), each.runtime, bytes(each.bytes),
      h("span", { class: `chip r-${each.state}` }, each.state), String(each.devices), time(each.added_ms)]), "No release yet: whimbrel release add"));
}

export async function releasePage(body, { parts: [family, version], onLeave, say, confirmed }) {
  async function load() {
    const release = await ask(path({ family, version }));
    replace(body, h("h1", {}, `${family} ${version} `, h("span", { class: `chip r-${release.state}` }, release.state)),
      figures([[bytes(release.bytes), `in ${release.files.length} file(s) for ${release.runtime}`], [String(release.devices), "devices run it"],
        [String(release.prompts), "golden prompts"], [release.memory_bytes ? bytes(release.memory_bytes) : "–", "memory needed"],
        [release.tiers.join(", ") || "all", "hardware tiers"]]),
      may("approver") ? h("div", { class: "row" },
        release.state === "draft" ? h("button", { class: "main", onclick: () => act("publish", "Sign and publish it?", "It can be rolled out from then on, and never changes.", "Publish") }, "Publish") : null,
        release.state === "published" ? h("button", { onclick: () => act("withdraw", "Withdraw it?", "No device installs it any more. Those that run it go on until a rollout leads them away.", "Withdraw") }, "Withdraw") : null) : null,
      h("section", { class: "card" }, h("h2", {}, "Ways to it"), release.deltas.length
        ? table("Deltas", ["From", "File", "Profile", "Delta", "Of the whole file"], release.deltas.map((each) => [each.base || "a file of no release", each.file, each.profile,
          bytes(each.bytes), percent(each.bytes / each.whole_bytes)])) : h("p", { class: "soft" }, "No delta is signed: devices fetch whole files.")),
      h("section", { class: "card" }, h("h2", {}, "Files"), table("Files", ["Name", "Size", "SHA-256"], release.files.map((each) => [each.name, bytes(each.bytes), h("code", {}, each.sha256)])),
        h("p", { class: "small soft" }, "Description: ", h("code", {}, release.digest), ", added ", time(release.added_ms), release.published_ms ? [", published ", time(release.published_ms)] : null)),
      h("section", { class: "card" }, h("h2", {}, "Scorecard ", release.scorecard ? h("span", { class: `chip v-${release.scorecard.verdict}` }, release.scorecard.verdict) : null),
        comparison(release.comparison), release.scorecard ? h("pre", { tabindex: 0 }, release.scorecard.lines.join("\n")) : h("p", { class: "soft" }, `Nobody kept score: whimbrel score ${family} ${version}`)),
      tradeoffs(family, version, onLeave),
      h("section", { class: "card" }, h("h2", {}, "Where it comes from"), release.provenance
        ? h("pre", { tabindex: 0 }, JSON.stringify(release.provenance, embedded, 2)) : h("p", { class: "soft" }, "Nobody said so: release add --provenance")));
  }

  async function act(action, title, text, button) {
    if (!await confirmed(title, text, button)) return;
    try {
      const after = await post(`${path({ family, version })}/${action}`);
      say(`${family} ${version} is ${after.state === "draft" ? "waiting for signatures of others" : words(after.state)}`);
    } catch (error) {
      say(error.message, true);
    }
    await load();
  }

  await load();
}

// A file inside a statement is told by its length; `release export` writes it whole.
const embedded = (key, value) => key === "content" && typeof value === "string" && value ? `${value.length} characters of base64` : value;

const path = ({ family, version }) => `releases/${encodeURIComponent(family)}/${encodeURIComponent(version)}`;
