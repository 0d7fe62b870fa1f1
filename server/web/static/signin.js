import { post } from "./api.js";
import { h, replace } from "./dom.js";

export function signInPage(body, onDone) {
  const problem = h("p", { role: "alert", class: "no" });
  const user = h("input", { id: "user", name: "user", autocomplete: "username", required: true, autocapitalize: "none" });
  const password = h("input", { id: "password", name: "password", type: "password", autocomplete: "current-password", required: true });
  const form = h("form", { class: "card narrow", onsubmit: submit },
    h("h1", {}, "Whimbrel"),
    h("label", { for: "user" }, "Name"), user,
    h("label", { for: "password" }, "Password"), password,
    problem,
    h("button", { class: "main" }, "Sign in"),
    h("p", { class: "small soft" }, "Accounts are made on the server: ", h("code", {}, "whimbrel users add NAME")));

  async function submit(event) {
    event.preventDefault();
    try {
      await post("session", { user: user.value, password: password.value });
    } catch (error) {
      problem.textContent = error.message;
      password.select();
      return;
    }
    await onDone();
  }

  document.title = "Sign in – Whimbrel";
  replace(body, form);
  user.focus();
}
