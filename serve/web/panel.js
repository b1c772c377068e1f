// The drawers (conversations, settings), the settings' form, the theme, the question for a key.

import { byId, el } from "./dom.js";
import { SAMPLING } from "./job.js";
import { apiKey, keepApiKey, keepTheme } from "./store.js";

/** A side panel: beside the chat where there is room, else over it, and then all else is out of reach. */
export class Drawer {
  /** `crowded`: the media query of windows that have no room for it; in others it is open at first where `open` says. */
  constructor(panel, toggle, crowded, open) {
    this.panel = panel;
    this.toggle = toggle;
    this.crowded = matchMedia(crowded);
    toggle.addEventListener("click", () => (this.open ? this.hide() : this.show()));
    panel.querySelector(".close").addEventListener("click", () => this.hide());
    byId("shade").addEventListener("click", () => this.over && this.hide());
    panel.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.over) {
        event.stopPropagation();
        this.hide();
      }
    });
    this.crowded.addEventListener("change", () => this.set(open && !this.crowded.matches));
    this.set(open && !this.crowded.matches);
  }

  get over() {
    return this.open && this.crowded.matches;
  }

  show() {
    this.set(true);
    this.panel.querySelector("button, textarea, input").focus();
  }

  hide() {
    this.set(false);
    this.toggle.focus();
  }

  /** Out of the way once something was chosen in it, where it covers the chat. */
  yield() {
    if (this.over) this.set(false);
  }

  set(open) {
    this.open = open;
    this.panel.hidden = !open;
    this.toggle.setAttribute("aria-expanded", String(open));
    for (const other of document.querySelectorAll("#app > *")) {
      if (other !== this.panel && other.id !== "shade") other.inert = this.over;
    }
    byId("shade").hidden = !this.over;
  }
}

/** The settings' form over a conversation's settings; `changed` is called after each change. */
export class SettingsForm {
  constructor(changed) {
    this.form = byId("settings-form");
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => {
      this.read();
      changed();
    });
    byId("settings-reset").addEventListener("click", () => {
      for (const name of SAMPLING) this.form.elements[name].value = "";
      this.read();
      changed();
    });
  }

  show(settings) {
    this.settings = settings;
    this.form.elements.system.value = settings.system ?? "";
    for (const name of SAMPLING) this.form.elements[name].value = settings[name] ?? "";
  }

  read() {
    this.settings.system = this.form.elements.system.value;
    for (const name of SAMPLING) {
      const { value } = this.form.elements[name];
      if (value === "") delete this.settings[name];
      else this.settings[name] = Number(value);
    }
  }

  /** False where a number is out of its range; the browser then says which, in the opened panel. */
  valid(drawer) {
    if (this.form.checkValidity()) return true;
    drawer.show();
    this.form.reportValidity();
    return false;
  }
}

/** The button that goes from one theme to the other; where that is the system's, the system decides again. */
export function themeSwitch(button) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const now = () => document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light");
  const label = () => {
    const text = `Switch to ${now() === "dark" ? "light" : "dark"} theme`;
    button.setAttribute("aria-label", text);
    button.title = text;
  };
  button.addEventListener("click", () => {
    const next = now() === "dark" ? "light" : "dark";
    const chosen = (next === "dark") === system.matches ? null : next;
    if (chosen) document.documentElement.dataset.theme = chosen;
    else delete document.documentElement.dataset.theme;
    keepTheme(chosen);
    label();
  });
  system.addEventListener("change", label);
  label();
}

/** Ask for the API key; resolves when one was given or the question was dismissed. `reason`: the server's sentence. */
export function askForKey(reason) {
  const dialog = byId("key");
  const field = byId("key-field");
  byId("key-reason").textContent = reason ?? "";
  byId("key-reason").hidden = !reason;
  field.value = apiKey();
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  field.select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "use";
      if (given) keepApiKey(field.value.trim());
      field.value = "";
      resolve(given);
    }, { once: true });
  });
}

/** A sentence above the message box, with something to press or without. */
export function notice(text, label, press) {
  const box = byId("notice");
  const close = () => {
    box.hidden = true;
    box.replaceChildren();
  };
  if (!text) return close();
  box.replaceChildren(el("p", { text }));
  if (label) box.append(el("button", { type: "button", class: "button", text: label, on: { click: () => {
    close();
    press();
  } } }));
  box.append(el("button", { type: "button", class: "button", text: "Dismiss", on: { click: close } }));
  box.hidden = false;
}
