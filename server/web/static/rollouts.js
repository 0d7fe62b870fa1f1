// Rollouts as a list, and one with its waves, its evidence, every decision, and its devices, live.

import { ask, may, post } from "./api.js";
import { bytes, duration, figures, h, link, replace, statusBar, svg, table, time, words } from "./dom.js";
import { live } from "./live.js";
import { followAlerts } from "./trail.js";

const STATUSES = ["committed", "running", "asked", "rejected", "rolled_back", "failed", "silent", "deferred", "withdrawn"];

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
  const waves = h("input", { id: "waves", value: "2,100%", required: true, "aria-describedby": "waves-help" });
  const soak = h("input", { id: "soak", type: "number", min: 0, value: 0 });
  const flight = h("input", { id: "flight", type: "number", min: 1, placeholder: "0.5 %, at least 5" });
  const timeout = h("input", { id: "timeout", type: "number", min: 1, value: 3600 });
  return h("form", { class: "card", onsubmit: submit }, h("h2", {}, "Start a rollout"),
    releases.length ? [h("div", { class: "fields" }, h("label", { for: "release" }, "Release", release), h("label", { for: "waves" }, "Waves", waves),
      h("label", { for: "soak" }, "Seconds to soak after each", soak), h("label", { for: "flight" }, "Devices at a time", flight),
      h("label", { for: "timeout" }, "Seconds a device may take", timeout), h("button", { class: "main" }, "Start")),
    h("p", { class: "small soft", id: "waves-help" }, "Waves: ", h("code", {}, "2,100%"), " is two devices, then all; ", h("code", {}, "3@label:lab,59,10%,100%"),
      " three of the lab, 59, a tenth, all; ", h("code", {}, "proof"), " as many as it takes to prove the release.")]
      : h("p", { class: "soft" }, "No release is published."));

  async function submit(event) {
    event.preventDefault();
    const [family, version] = release.value.split("/");
    try {
      const made = await post("rollouts", { family, version, waves: waves.value, soak_s: [Number(soak.value)], wave_timeout_s: Number(timeout.value),
        in_flight_max: flight.value ? Number(flight.value) : null });
      say(`Rollout ${made.id} of ${family} ${version} has started`);
      location.hash = `#/rollouts/${made.id}`;
    } catch (error) {
      say(error.message, true);
    }
  }
}

const ACTIONS = {
  pause: ["Pause", "operator", ["running"], "Nobody else is asked for now. Devices that were asked go on by themselves."],
  resume: ["Resume", "operator", ["paused"], "It goes on, and what paused it is accepted."],
  promote: ["Promote", "approver", ["running", "paused"], "The next wave begins now, whatever this one has proved."],
  abort: ["Abort", "operator", ["created", "preparing", "running", "paused"], "Nobody else is asked, for good. Devices that have not begun keep what they run."],
};

export async function rolloutPage(body, { parts: [id], onLeave, say, confirmed }) {
  const place = h("div", {});
  const actions = h("div", { class: "row" });
  const why = h("input", { id: "why", placeholder: "why, for those who come after you", maxlength: 500 });
  const status = h("select", { id: "status", onchange: () => load() }, h("option", { value: "" }, "all"),
    STATUSES.map((each) => h("option", { value: each }, words(each))));
  const members = h("div", {});
  const head = h("div", {});
  const alerts = h("div", {});
  replace(body, head, actions, place, alerts, h("section", { class: "card" }, h("h2", {}, "Devices"), h("p", {}, h("label", { for: "status" }, "Show "), status), members));
  let isLoading = false;
  let shown = null;

  async function load() {
    if (isLoading) return;
    isLoading = true;
    try {
      draw(await ask(`rollouts/${encodeURIComponent(id)}?limit=200&status=${status.value}`));
    } finally {
      isLoading = false;
    }
  }

  async function act(action) {
    const [title, , , text] = ACTIONS[action];
    if (!await confirmed(`${title} ${id}?`, text, title)) return;
    try {
      await post(`rollouts/${encodeURIComponent(id)}/orders`, { action, reason: why.value, seen: shown.orders });
      why.value = "";
      say(`Ordered: ${action} ${id}`);
    } catch (error) {
      say(error.message, true);
    }
    await load();
  }

  function drawActions(rollout) {
    const possible = Object.entries(ACTIONS).filter(([name, [, role, states]]) => may(role) && states.includes(rollout.state)
      && !(name === "promote" && rollout.wave >= rollout.waves.length - 1));
    const key = possible.map(([name]) => name).join();
    if (actions.dataset.key === key) return;  // a button that has the focus stays
    actions.dataset.key = key;
    replace(actions, possible.map(([name, [title]]) => h("button", { type: "button", class: name === "abort" ? "danger" : "", onclick: () => act(name) }, title)),
      possible.length ? h("label", { for: "why", class: "grow" }, "Reason ", why) : null);
  }

  function draw(rollout) {
    shown = rollout;
    drawActions(rollout);
    replace(head, h("h1", {}, `${rollout.id}: ${rollout.family} ${rollout.version} `, h("span", { class: `chip r-${rollout.state}` }, words(rollout.state))),
      h("p", { class: rollout.state === "stopped" ? "card no" : "card", role: "status" }, rollout.reason || rollout.standing),
      h("p", { class: "soft" }, "created ", time(rollout.created_ms), rollout.created_by ? ` by ${rollout.created_by}` : null,
        rollout.begun_ms ? [", first device asked ", time(rollout.begun_ms)] : null, rollout.finished_ms ? [", ended ", time(rollout.finished_ms)] : null, ". ",
        link(`releases/${encodeURIComponent(rollout.family)}/${encodeURIComponent(rollout.version)}`, "The release")));
    replace(place, h("section", { class: "card" }, h("h2", {}, "Waves"),
      h("p", { class: "soft small" }, `${rollout.in_flight} under way`, rollout.in_flight_max ? ` of at most ${rollout.in_flight_max} at a time` : null,
        rollout.pace_per_minute ? `, at most ${rollout.pace_per_minute} asked in a minute` : null),
      h("ol", { class: "waves" }, rollout.waves.map((wave, number) => h("li", { "aria-current": number === rollout.wave && !rollout.finished_ms ? "step" : undefined },
        h("h3", {}, `${words(wave.name)}: ${wave.size}`, wave.soak_ms ? h("span", { class: "soft small" }, `, soaks ${duration(wave.soak_ms)}`) : null),
        statusBar(wave.counts, words(wave.name)))))),
    rollout.evidence ? evidence(rollout.evidence, rollout) : null,
    Object.keys(rollout.codes).length ? h("section", { class: "card" }, h("h2", {}, "Why devices did not commit"),
      table("Reasons", ["Code", "Devices"], Object.entries(rollout.codes).map(([code, count]) => [h("code", {}, code), String(count)]))) : null,
    h("section", { class: "card", id: "decisions" }, h("h2", {}, "Decisions"), rollout.decisions.length ? h("ol", { class: "story", reversed: true }, [...rollout.decisions].reverse().map((each) =>
      h("li", { class: `d-${each.action}` }, time(each.at_ms), h("div", {}, h("b", {}, each.action), each.by ? ` by ${each.by}` : null, `: ${each.text}`,
        each.reason ? h("div", { class: "small" }, `“${each.reason}”`) : null)))) : h("p", { class: "soft" }, "None yet.")));
    replace(members, table(`${rollout.members_total} devices`, ["Device", "Wave", "Status", "Received", "Reason"], rollout.members.map((each) => [
      link(`devices/${encodeURIComponent(each.device)}`, each.device), words(each.wave), h("span", { class: `chip s-${each.status}` }, words(each.status)),
      each.full_bytes ? `${bytes(each.received_bytes)} of ${bytes(each.full_bytes)}` : "–", each.code ? `${each.code} ${each.detail}` : "–"]), "No device."));
  }

  await load();
  onLeave(whenChanged(() => live.version, load));
  await followAlerts(alerts, id, onLeave);
}

// What the outcomes say, and the line at which they stop the rollout.
function evidence(found, rollout) {
  const odds = found.odds < 1 ? "below 1" : Math.round(found.odds).toLocaleString("en");
  return h("section", { class: "card" }, h("h2", {}, "Evidence"),
    figures([[`${odds} : 1`, `odds against the release; it stops at ${found.limit.toLocaleString("en")} : 1`],
      [found.is_proved ? "proved" : "not proved", "that few enough fail, by Wald's test"],
      [rollout.failures_max === null ? "–" : String(rollout.failures_max), "failures accepted in a wave, beside the tests"]]),
    h("p", {}, found.text), chart(found));
}

function chart({ stop_line: line, course }) {
  const [width, height, left, bottom] = [640, 206, 46, 40];
  const asked = line.length;
  const failed = Math.max(line[asked - 1] + 1, ...course.map((each) => each[1] + 1));
  const x = (count) => left + (count / asked) * (width - left - 10);
  const y = (count) => height - bottom - (count / failed) * (height - bottom - 12);
  const stop = line.map((count, index) => `${x(index + 1)},${y(count)}`).join(" ");
  const steps = [[0, 0]];
  for (const [count, bad] of course) { steps.push([count, steps.at(-1)[1]], [count, bad]); }
  const last = course.at(-1) || [0, 0];
  const unit = failed > 12 ? Math.ceil(failed / 6) : 2;
  const marks = Array.from({ length: Math.floor(failed / unit) + 1 }, (_, index) => index * unit);
  return svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Failures by devices asked: ${last[1]} of ${last[0]} failed; it stops at ${line[Math.min(Math.max(last[0], 1), asked) - 1]}` },
  marks.map((mark) => [svg("line", { class: "grid", x1: left, x2: width - 10, y1: y(mark), y2: y(mark) }), svg("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end" }, String(mark))]),
  [0, 0.25, 0.5, 0.75, 1].map((share) => svg("text", { x: x(asked * share), y: height - 22, "text-anchor": share === 1 ? "end" : "middle" }, String(Math.round(asked * share)))),
  svg("text", { x: (width + left) / 2, y: height - 4, "text-anchor": "middle" }, "devices, in the order of asking"),
  svg("polygon", { class: "stop-area", points: `${x(1)},${y(failed)} ${stop} ${x(asked)},${y(failed)}` }),
  svg("polyline", { class: "stop-line", points: stop }),
  svg("text", { class: "stop-text", x: x(asked) - 6, y: y(failed) + 14, "text-anchor": "end" }, "stops here"),
  svg("polyline", { class: "course", points: steps.map(([count, bad]) => `${x(Math.min(count, asked))},${y(bad)}`).join(" ") }),
  svg("circle", { class: "now", cx: x(Math.min(last[0], asked)), cy: y(last[1]), r: 4 }));
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
