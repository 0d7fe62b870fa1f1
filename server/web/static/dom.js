// Elements and texts. Everything that comes from the server goes in as text, never as markup.

export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function svg(tag, properties = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
  element.append(...children.flat(Infinity));
  return element;
}

export function bytes(count) {
  if (count < 1000) return `${count} B`;
  let size = count;
  for (const unit of ["kB", "MB", "GB", "TB"]) {
    size /= 1000;
    if (size < 999.5 || unit === "TB") return `${size.toFixed(size < 100 ? 1 : 0)} ${unit}`;
  }
}

export function instant(ms) {
  return ms ? new Date(ms).toISOString().replace("T", " ").slice(0, 19) + " UTC" : "–";
}

export function duration(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  const seconds = ms / 1000;
  if (seconds < 90) return `${seconds.toFixed(1)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(1)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}

export const percent = (share) => `${(share * 100).toFixed(share > 0.995 || share < 0.1 ? 1 : 0)} %`;
export const words = (name) => name.replaceAll("_", " ");

export function time(ms) {
  return ms ? h("time", { datetime: new Date(ms).toISOString() }, instant(ms)) : "–";
}

export function table(caption, titles, rows, empty = "Nothing yet.") {
  if (!rows.length) return h("p", { class: "soft" }, empty);
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h("table", {},
      h("caption", {}, caption),
      h("thead", {}, h("tr", {}, titles.map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell) => h("td", {}, cell)))))));
}

export function figures(pairs) {
  return h("dl", { class: "figures" }, pairs.map(([value, meaning]) => h("div", {}, h("dt", {}, meaning), h("dd", {}, value))));
}

// A bar of parts, with the same in words beside it: colour alone says nothing.
const ORDER = ["committed", "running", "asked", "rejected", "withdrawn", "rolled_back", "failed", "silent", "deferred"];
export function statusBar(counts, label) {
  const names = Object.keys(counts).filter((name) => counts[name]).sort((a, b) => ORDER.indexOf(a) - ORDER.indexOf(b));
  const total = names.reduce((sum, name) => sum + counts[name], 0);
  const text = names.map((name) => `${counts[name]} ${words(name)}`).join(", ") || "no device asked yet";
  return h("div", { class: "bar" },
    h("div", { class: "track", role: "img", "aria-label": `${label}: ${text}` },
      names.map((name) => { const part = h("i", { class: `s-${name}` }); part.style.flexGrow = counts[name]; return part; })),
    h("div", { class: "small soft" }, `${total ? `${total} ${total === 1 ? "device" : "devices"}: ` : ""}${text}`));
}

export function link(path, ...children) {
  return h("a", { href: `#/${path}` }, ...children);
}

export function replace(parent, ...children) {
  parent.replaceChildren(...children.flat(Infinity).filter(Boolean));
}
