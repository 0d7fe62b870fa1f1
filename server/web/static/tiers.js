// Hardware tiers: what each has, what its devices run, which releases fit and why others are refused.

import { ask } from "./api.js";
import { figures, h, link, replace, table } from "./dom.js";

export async function tiersPage(body) {
  const { tiers, strays } = await ask("tiers");
  const lost = Object.entries(strays).map(([name, count]) => `${count} of ${name ? `tier ${name}` : "no tier"}`).join(", ");
  replace(body, h("h1", {}, "Hardware tiers"),
    tiers.length ? null : h("p", { class: "soft" }, "No tier yet: every release is for all devices. Write tiers/NAME.toml in the server's folder (docs/tiers.md)."),
    lost && tiers.length ? h("p", { role: "note", class: "no" }, `Devices that get no release, since no file says what their tier has: ${lost}.`) : null,
    tiers.map(card));
}

function card(tier) {
  const speed = tier.memory_gb_per_s ? `${tier.memory_gb_per_s} GB/s` : tier.measured ? `${tier.measured} measured` : "–";
  const running = tier.running.map((each) => `${each.version || "nothing"} on ${each.devices}`).join(", ");
  return h("section", { class: "card" }, h("h2", {}, `${tier.name} `, h("span", { class: "small soft" }, tier.runtime)),
    figures([[String(tier.devices), running || "devices"], [`${tier.memory_mb} MB`, "memory for everything"], [`${tier.disk_mb} MB`, "disk for models"],
      [speed, "speed of its memory"], [tier.token_ms_max ? `${tier.token_ms_max} ms` : "–", "longest time for a token"],
      [tier.stop_first ? "one" : "both", "versions in memory during the swap"]]),
    table(`Releases on ${tier.name}`, ["Release", "Verdict", "Model", "In the swap", "Disk", "A token", "Why"], tier.releases.map((each) => [
      link(`releases/${encodeURIComponent(each.family)}/${encodeURIComponent(each.version)}`, `${each.family} ${each.version}`),
      h("span", { class: `chip ${each.fits ? "v-passed" : "v-failed"}` }, !each.fits ? "refused" : each.is_for ? "fits" : "fits, not signed for it"),
      `${mebibytes(each.model_bytes)} ${each.source}`, mebibytes(each.swap_bytes), mebibytes(each.disk_bytes),
      each.token_ms === null ? "–" : `${each.token_ms.toPrecision(3)} ms`,
      h("span", {}, each.broken.join("; "), each.would_fit.length ? h("span", { class: "soft" }, ` Would fit: ${each.would_fit.join("; ")}.`) : null)]),
    "No release of its runtime yet."));
}

// As tier files have them.
const mebibytes = (count) => `${(count / 2 ** 20).toFixed(1)} MB`;
