// A release beside the one before it, and beside the other versions of its family on each tier.

import { ask } from "./api.js";
import { bytes, h, link, replace, table } from "./dom.js";

export function comparison(found) {
  if (!found) return null;
  return h("div", {}, h("h3", {}, `Beside ${found.version}`),
    h("p", { class: "small soft" }, found.is_paired ? "Both were asked the same questions; in brackets what holds the true change with 95 % confidence."
      : "The scorecards were made apart from each other: differences may be chance."),
    table(`Scorecards beside ${found.version}`, ["Figure", "Before", "Now", "Change"], found.rows.map((row) => [row.name, value(row.before, row.unit), value(row.now, row.unit), change(row)])));
}

export function tradeoffs(family, version, onLeave) {
  const body = h("div", {}, h("p", { class: "soft" }, "Comparing …"));
  let isLeft = false;
  onLeave(() => { isLeft = true; });
  ask(`tradeoffs/${encodeURIComponent(family)}`).then((report) => { if (!isLeft) replace(body, show(report, family, version)); },
    (error) => { if (!isLeft) replace(body, h("p", { class: "soft" }, error.message)); });
  return h("section", { class: "card" }, h("h2", {}, "Trade-offs in the family"), body);
}

function show(report, family, version) {
  const names = Object.fromEntries(report.candidates.map((each) => [each.version, each]));
  return [h("p", {}, report.paragraph),
    report.tiers.map((tier) => table(`${tier.name}: ${tier.devices} ${tier.devices === 1 ? "device" : "devices"}`, ["Standing", "Version", "Right", "Drift, nats", "Latency", "Memory", "To each device", "Energy", "Why"],
      tier.options.map((option) => row(option, names[option.version], family, version)))),
    h("ul", { class: "small soft" }, report.notes.map((note) => h("li", {}, note)))];
}

function row(option, candidate, family, version) {
  const name = option.version === version ? h("b", {}, version) : link(`releases/${encodeURIComponent(family)}/${encodeURIComponent(option.version)}`, option.version);
  const suites = candidate.suites.filter((suite) => !["golden", "edge"].includes(suite.kind));
  return [h("span", { class: `chip ${option.is_best ? "v-passed" : option.fits === false || candidate.standing === "failed" ? "v-failed" : ""}` }, mark(option, candidate)), name,
    suites.map((suite) => h("div", {}, `${suite.name} ${value(suite.accuracy.value, "share")} (${(100 * suite.accuracy.low).toFixed(1)} to ${(100 * suite.accuracy.high).toFixed(1)})`)),
    candidate.is_reference ? "reference" : candidate.drift ? `${candidate.drift.mean.value.toFixed(4)} (${candidate.drift.mean.low.toFixed(4)} to ${candidate.drift.mean.high.toFixed(4)})` : "–",
    option.latency ? h("span", { title: option.latency.basis }, `${option.latency.value.toPrecision(3)} ms`) : "–",
    option.memory ? h("span", { title: option.memory.basis }, `${(option.memory.value / 2 ** 20).toFixed(1)} MB`) : "–",
    bytes(Math.round(option.air.mean_bytes)), option.energy ? `${option.energy.value.toPrecision(3)} mJ` : "–", why(option, candidate)];
}

function mark(option, candidate) {
  if (option.is_best) return option.perhaps_beaten_by.length ? "perhaps best" : "best";
  if (option.fits === false) return "refused";
  if (option.beaten_by.length) return "beaten";
  return { failed: "failed", incomplete: "incomplete", apart: "not comparable", unscored: "no scorecard" }[candidate.standing] ?? "out";
}

function why(option, candidate) {
  const better = (rival) => `${rival.version} is better in ${rival.better.join(", ")}${rival.undecided.length ? `, if no worse in ${rival.undecided.join(", ")}` : ""}`;
  return [...option.broken.map((each) => each.detail), candidate.reason, ...option.beaten_by.map(better), ...option.perhaps_beaten_by.map(better)].filter(Boolean).join("; ");
}

function value(number, unit) {
  if (number === null) return "–";
  return { bytes: () => bytes(Math.round(number)), ms: () => `${number.toPrecision(3)} ms`, "per second": () => number.toFixed(1),
    operations: () => (number < 1e8 ? `${(number / 1e6).toPrecision(3)} MFLOP` : `${(number / 1e9).toPrecision(3)} GFLOP`), share: () => `${(100 * number).toFixed(1)} %`, nats: () => number.toFixed(4) }[unit]();
}

function change(row) {
  if (row.change) {
    const [mean, low, high] = row.change.map((end) => (row.unit === "share" ? (100 * end).toFixed(1) : end.toFixed(4)));
    const text = `${row.unit === "share" && row.change[0] >= 0 ? "+" : ""}${mean}${row.unit === "share" ? " points" : ""} (${low} to ${high})`;
    return row.is_better === null ? text : h("span", { class: row.is_better ? "yes" : "no" }, `${text}: ${row.is_better ? "better" : "worse"}`);
  }
  if (row.before === null || row.now === null || !row.before || row.unit === "share") return "";
  const share = row.now / row.before - 1;
  return Math.abs(share) < 0.0005 ? "the same" : `${share > 0 ? "+" : "−"}${(100 * Math.abs(share)).toFixed(1)} %`;
}
