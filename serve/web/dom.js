// Making elements: text always as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element with properties and children. `class`, `text`, `on` (handlers) and attributes are told apart by name. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") made.className = value;
    else if (name === "text") made.textContent = value;
    else if (name === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** One of the drawings at the top of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows a drawing; the label is its name and its tooltip. */
export function iconButton(name, label, press) {
  return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, on: { click: press } },
    icon(name));
}

/** A button that copies and says so for a moment. `text` is asked when it is pressed. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const done = await copy(text());
    button.replaceChildren(icon(done ? "check" : "alert"));
    button.title = done ? "Copied" : "This browser does not allow copying";
    announce(button.title);
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.title = label;
    }, 1600);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without TLS, browsers offer no clipboard but on this machine's own address; the older way still works.
    const field = el("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    field.value = text;
    const focused = document.activeElement;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return done;
  }
}

const KEPT_ANNOUNCEMENTS = 20;

/** Have a screen reader say something when it next has time. */
export function announce(text) {
  const region = byId("announcer");
  region.append(el("p", { text }));
  while (region.childElementCount > KEPT_ANNOUNCEMENTS) region.firstElementChild.remove();
}

const numbers = new Map();

/** A number for people: digits in groups, at most `digits` of them after the point. */
export function number(value, digits = 0) {
  if (!numbers.has(digits)) numbers.set(digits, new Intl.NumberFormat("en", { maximumFractionDigits: digits }));
  return numbers.get(digits).format(value);
}
