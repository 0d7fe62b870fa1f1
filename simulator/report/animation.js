"use strict";
(() => {
  const data = JSON.parse(document.getElementById("fleet-data").textContent);
  const canvas = document.getElementById("fleet-canvas");
  const drawing = canvas.getContext("2d");
  const slider = document.getElementById("fleet-slider");
  const button = document.getElementById("fleet-play");
  const speed = document.getElementById("fleet-speed");
  const clock = document.getElementById("fleet-clock");
  const pointed = document.getElementById("fleet-device");
  const tallies = [...document.querySelectorAll("[data-band]")];
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const WHOLE_S = 24, STEPS = 1000, CALM_STEP_S = 1, LABEL = 20, GAP = 6, HEIGHT_MAX = 460;

  const changes = unpack(data.changes);
  const dots = data.numbers.length;
  const state = new Uint8Array(dots);
  const counts = new Array(data.bands.length);
  let applied = 0, position = 0, playing = false, before = 0, colours = [], places = [], cell = 8, ratio = 1;

  function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const at = [], dot = [], band = [];
    let offset = 0, time = 0;
    const next = () => {
      let value = 0, factor = 1, byte;
      do {
        byte = bytes[offset++];
        value += (byte & 127) * factor;
        factor *= 128;
      } while (byte & 128);
      return value;
    };
    while (offset < bytes.length) {
      time += next();
      at.push(time);
      dot.push(next());
      band.push(next());
    }
    return { at, dot, band };
  }

  function reset() {
    state.fill(data.first);
    counts.fill(0);
    counts[data.first] = dots;
    applied = 0;
  }

  function instant(where) {
    let last = data.knots[0];
    for (const knot of data.knots) {
      if (where <= knot[1]) {
        const width = knot[1] - last[1];
        return width ? last[0] + ((where - last[1]) / width) * (knot[0] - last[0]) : knot[0];
      }
      last = knot;
    }
    return last[0];
  }

  function seek(where) {
    position = Math.min(1, Math.max(0, where));
    const until = instant(position);
    if (applied && changes.at[applied - 1] > until) reset();
    while (applied < changes.at.length && changes.at[applied] <= until) {
      const dot = changes.dot[applied], band = changes.band[applied++];
      counts[state[dot]]--;
      counts[band]++;
      state[dot] = band;
    }
    draw();
    tell(until);
  }

  function words(milliseconds) {
    const sign = milliseconds < 0 ? "\u2212" : "", seconds = Math.abs(milliseconds) / 1000;
    const whole = Math.floor(seconds), two = (value) => String(value).padStart(2, "0");
    if (seconds < 60) return `${sign}${seconds.toFixed(1)} s`;
    const minutes = Math.floor(whole / 60) % 60, hours = Math.floor(whole / 3600);
    return hours ? `${sign}${hours} h ${two(minutes)} min ${two(whole % 60)} s` : `${sign}${minutes} min ${two(whole % 60)} s`;
  }

  function tell(until) {
    const time = words(until - data.zero);
    clock.textContent = time;
    slider.value = Math.round(position * STEPS);
    slider.setAttribute("aria-valuetext", `${time} after the first rollout began`);
    for (const tally of tallies) tally.textContent = counts[Number(tally.dataset.band)].toLocaleString("en");
  }

  function arrange() {
    const width = canvas.clientWidth, named = data.groups.length > 1;
    const height = (size) => data.groups.reduce((sum, group) =>
      sum + (named ? LABEL : 0) + Math.ceil(group.count / Math.max(1, Math.floor(width / size))) * size + GAP, 0);
    cell = 22;
    while (cell > 3 && height(cell) > HEIGHT_MAX) cell -= 0.5;
    const columns = Math.max(1, Math.floor(width / cell));
    places = [];
    let top = 0, dot = 0;
    data.groups.forEach((group) => {
      if (named) top += LABEL;
      places.push({ name: named ? group.name : "", count: group.count, first: dot, top, columns });
      top += Math.ceil(group.count / columns) * cell + GAP;
      dot += group.count;
    });
    ratio = window.devicePixelRatio || 1;
    canvas.style.height = `${top}px`;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(top * ratio);
    const style = getComputedStyle(document.documentElement);
    colours = data.bands.map((band) => style.getPropertyValue(`--${band.kind}`).trim());
    colours.text = style.getPropertyValue("--soft").trim();
    draw();
  }

  function draw() {
    drawing.setTransform(ratio, 0, 0, ratio, 0, 0);
    drawing.clearRect(0, 0, canvas.width, canvas.height);
    drawing.font = "13px system-ui, sans-serif";
    const size = Math.max(1.5, cell - (cell > 6 ? 2 : 1)), round = size > 6 ? size / 3 : 0;
    for (const place of places) {
      if (place.name) {
        drawing.fillStyle = colours.text;
        drawing.fillText(`${place.name} (${place.count.toLocaleString("en")})`, 0, place.top - 6);
      }
      for (let index = 0; index < place.count; index++) {
        drawing.fillStyle = colours[state[place.first + index]];
        const x = (index % place.columns) * cell, y = place.top + Math.floor(index / place.columns) * cell;
        if (round) {
          drawing.beginPath();
          drawing.roundRect(x, y, size, size, round);
          drawing.fill();
        } else {
          drawing.fillRect(x, y, size, size);
        }
      }
    }
  }

  function frame(now) {
    if (!playing) return;
    const passed = Math.min(0.25, (now - before) / 1000) * Number(speed.value) / WHOLE_S;
    if (!calm.matches || now - before >= CALM_STEP_S * 1000) {
      seek(position + (calm.matches ? CALM_STEP_S * Number(speed.value) / WHOLE_S : passed));
      before = now;
    }
    if (position >= 1) return play(false);
    requestAnimationFrame(frame);
  }

  function play(wanted) {
    playing = wanted;
    button.textContent = playing ? "Pause" : "Play";
    if (!playing) return;
    if (position >= 1) seek(0);
    before = performance.now();
    requestAnimationFrame(frame);
  }

  function point(event) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const place = places.findLast((each) => y >= each.top);
    const column = Math.floor(x / cell);
    const index = place ? Math.floor((y - place.top) / cell) * place.columns + column : -1;
    const found = place && column < place.columns && index >= 0 && index < place.count;
    pointed.textContent = found
      ? `device ${data.numbers[place.first + index]}: ${data.bands[state[place.first + index]].name}` : "\u00a0";
  }

  button.addEventListener("click", () => play(!playing));
  slider.addEventListener("input", () => { play(false); seek(Number(slider.value) / STEPS); });
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerleave", () => { pointed.textContent = "\u00a0"; });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: position - 0.01, ArrowRight: position + 0.01, Home: 0, End: 1 };
    if (event.key === " ") play(!playing);
    else if (event.key in moves) { play(false); seek(moves[event.key]); }
    else return;
    event.preventDefault();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", arrange);
  new ResizeObserver(arrange).observe(canvas.parentElement);
  document.getElementById("fleet-stage").hidden = false;
  reset();
  arrange();
  seek(0);
})();
