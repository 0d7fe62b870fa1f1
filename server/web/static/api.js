// Requests to the server. What it refuses is thrown as a `Refusal` with its own words.

export class Refusal extends Error {
  constructor(status, problem) {
    super(problem.message + (problem.hint ? ` (${problem.hint})` : ""));
    this.status = status;
    this.code = problem.code;
  }
}

export const visitor = { user: "", role: "", csrf: "", fleet: "" };
const RANKS = ["viewer", "operator", "approver"];
export const may = (role) => RANKS.indexOf(visitor.role) >= RANKS.indexOf(role);

export async function ask(path, { method = "GET", body } = {}) {
  const headers = { Accept: "application/json" };
  if (method !== "GET") headers["X-CSRF-Token"] = visitor.csrf;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(`/api/v1/${path}`, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Refusal(0, { code: "web.unreachable", message: "The server does not answer", hint: "is it running?" });
  }
  if (response.status === 204) return null;
  const text = await response.text();
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Refusal(response.status, { code: "web.answer", message: `The server answered ${response.status}`, hint: "" });
  }
  if (response.ok) return value;
  if (response.status === 401 && visitor.user) window.dispatchEvent(new Event("signed-out"));
  throw new Refusal(response.status, value);
}

export const post = (path, body = {}) => ask(path, { method: "POST", body });
