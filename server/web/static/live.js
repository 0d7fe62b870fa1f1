// What the server pushes: rows of devices, and the fleet at a glance. Listeners are called at most once a frame.

export const live = { devices: new Map(), fleet: null, isConnected: false, version: 0 };
const listeners = new Set();
let source = null;
let isDue = false;
let left = 0;

function changed() {
  live.version += 1;
  if (isDue) return;
  isDue = true;
  const tell = () => { isDue = false; for (const listener of [...listeners]) listener(); };
  if (document.hidden) setTimeout(tell, 500); else requestAnimationFrame(tell);
}

function take(rows) {
  for (const row of rows) live.devices.set(row[0], row);
  changed();
}

export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

export function connect() {
  if (source) return;
  source = new EventSource("/api/v1/events");
  source.addEventListener("open", () => { live.isConnected = true; changed(); });
  source.addEventListener("error", () => {
    live.isConnected = false;
    changed();
    if (source && source.readyState === EventSource.CLOSED) {  // refused: signed out, or the server is new
      source = null;
      clearTimeout(left);
      left = setTimeout(connect, 3000);
    }
  });
  source.addEventListener("all", (event) => { live.devices.clear(); take(JSON.parse(event.data)); });
  source.addEventListener("devices", (event) => take(JSON.parse(event.data)));
  source.addEventListener("fleet", (event) => { live.fleet = JSON.parse(event.data); changed(); });
}

export function disconnect() {
  clearTimeout(left);
  if (source) source.close();
  source = null;
  live.isConnected = false;
  live.devices.clear();
  live.fleet = null;
}
