// The messages on the screen.

import { announce, byId, copyButton, el, icon, iconButton, number } from "./dom.js";
import { Growing, render } from "./markdown.js";

const LONG_TAIL = 20_000; // characters still unsettled, from which on they are shown more rarely
const RARELY = 400; // milliseconds
const COUNTED = 250; // milliseconds between two looks at the token counter

/** A message in the list. `actions`: edit(message, text), regenerate(message). */
export function messageView(message, actions) {
  return message.role === "user" ? new UserView(message, actions) : new ReplyView(message, actions);
}

class UserView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.root = el("li", { class: "message from-user" });
    this.show();
  }

  show() {
    this.root.classList.remove("is-edited");
    this.root.replaceChildren(
      el("h2", { class: "visually-hidden", text: "You" }),
      el("div", { class: "bubble", text: this.message.content }),
      el("div", { class: "tools" }, idle(iconButton("edit", "Edit and send again", () => this.edit())),
        copyButton("Copy message", () => this.message.content)));
  }

  edit() {
    const field = el("textarea", { "aria-label": "Edit your message", rows: 3 });
    field.value = this.message.content;
    const end = () => {
      this.show();
      this.root.querySelector(".icon-button").focus();
    };
    const form = el("form", { class: "edit", on: { submit: (event) => {
      event.preventDefault();
      if (field.value.trim()) this.actions.edit(this.message, field.value.trim());
    } } }, field, el("div", { class: "row" },
      el("span", { class: "muted", text: "What follows it is replaced." }),
      el("button", { type: "button", class: "button", text: "Cancel", on: { click: end } }),
      el("button", { type: "submit", class: "button primary", text: "Send" })));
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        end();
      } else if (sends(event)) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    this.root.classList.add("is-edited");
    this.root.replaceChildren(form);
    fit(field);
    field.addEventListener("input", () => fit(field));
    field.focus();
  }
}

class ReplyView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.body = el("div", { class: "prose" });
    this.foot = el("div", { class: "foot" });
    this.root = el("li", { class: "message from-model" },
      el("h2", { class: "visually-hidden", text: "Reply" }), this.body, this.foot);
    this.finish();
  }

  /** From now on `update` shows what has come in. */
  begin() {
    this.root.setAttribute("aria-busy", "true");
    this.root.classList.add("is-running");
    this.body.replaceChildren(el("p", { class: "waiting", "aria-label": "Waiting for the first token" },
      el("span"), el("span"), el("span")));
    this.foot.replaceChildren();
    this.growing = null;
    this.spoken = new Sentences(this.message.content.length);
    this.due = 0;
    this.counted = 0;
    this.frame = null;
    if (this.message.content) this.draw(); // it went on while another conversation was read
    announce("The reply is being written");
  }

  update() {
    this.spoken.feed(this.message.content);
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      const now = performance.now();
      if (now < this.due) return;
      this.draw();
      if (this.growing.unsettled > LONG_TAIL) this.due = now + RARELY;
      if (now - this.counted > COUNTED) {
        this.counted = now;
        this.foot.replaceChildren(statsLine(this.message, true));
      }
      this.actions.grown();
    });
  }

  draw() {
    if (!this.growing) {
      this.body.replaceChildren();
      this.growing = new Growing(this.body);
    }
    const { reasoning, content } = parts(this.message);
    if (reasoning && !this.thought) this.body.before(this.thought = reasoningBox());
    if (this.thought) this.thought.lastElementChild.textContent = reasoning;
    this.growing.write(content);
  }

  /** The message as it stands, with what can be done about it. */
  finish() {
    if (this.frame) cancelAnimationFrame(this.frame);
    this.frame = null;
    const wasRunning = this.root.classList.contains("is-running");
    this.root.classList.remove("is-running");
    this.root.removeAttribute("aria-busy");
    const { reasoning, content } = parts(this.message);
    this.thought?.remove();
    this.thought = reasoning ? reasoningBox(reasoning) : null;
    if (this.thought) this.body.before(this.thought);
    this.body.replaceChildren(render(content));
    if (this.message.error) this.body.append(errorBox(this.message.error));
    else if (!content && !reasoning) this.body.append(el("p", { class: "muted", text: emptyReason(this.message) }));
    const tools = el("div", { class: "tools" });
    if (content) tools.append(copyButton("Copy reply", () => content));
    tools.append(idle(iconButton("again", this.message.error ? "Try again" : "Write another reply",
      () => this.actions.regenerate(this.message))));
    this.foot.replaceChildren(tools, statsLine(this.message));
    if (wasRunning) this.say();
  }

  say() {
    if (this.message.error) return; // the box is an alert
    this.spoken.finish(this.message.content);
    announce(this.message.finish === "stopped" ? "Stopped" : `The reply is finished. ${counts(this.message)}`);
  }
}

/** Out of reach while a reply is written. */
function idle(button) {
  button.classList.add("when-idle");
  return button;
}

/** A reply's reasoning, in a field of its own or within think tags, apart from what it says. */
function parts(message) {
  const content = message.content ?? "";
  if (message.reasoning) return { reasoning: message.reasoning, content };
  const opened = /^\s*<think>/.exec(content);
  if (!opened) return { reasoning: "", content };
  const end = content.indexOf("</think>");
  if (end === -1) return { reasoning: content.slice(opened[0].length), content: "" };
  return { reasoning: content.slice(opened[0].length, end).trim(), content: content.slice(end + 8).trimStart() };
}

function reasoningBox(text = "") {
  return el("details", { class: "reasoning" }, el("summary", { text: "Reasoning" }), el("div", { text }));
}

/** The server's own sentence, with its status and code. */
export function errorBox({ status, code, param, message }) {
  const which = [status || null, code, param].filter(Boolean).join(" · ");
  return el("div", { class: "error", role: "alert" }, icon("alert"),
    el("div", {}, el("p", { text: message }), ...(which ? [el("p", { class: "which", text: which })] : [])));
}

function emptyReason(message) {
  if (message.finish === "stopped") return "Stopped before the first token.";
  return message.finish ? "The model ended its reply at once." : "No reply.";
}

function statsLine(message, running) {
  return el("span", { class: "stats" }, el("span", { class: "by", text: `${message.model} · ` }), counts(message, running));
}

function counts({ stats, finish, error }, running = false) {
  const said = [];
  if (stats?.completion) {
    said.push(`${stats.exact ? "" : "about "}${number(stats.completion)} token${stats.completion === 1 ? "" : "s"}`);
    if (stats.seconds > 0.05 && stats.completion > 1) {
      said.push(`${number((stats.completion - 1) / stats.seconds, 1)} per second`);
    }
    if (stats.first !== null) said.push(`first after ${number(stats.first, 2)} s`);
    if (stats.cached) said.push(`${number(stats.cached)} of ${number(stats.prompt)} prompt tokens cached`);
  }
  if (finish === "stopped") said.push("stopped");
  if (!finish && !error && !running) said.push("interrupted");
  if (finish === "length") said.push("ended by the token limit");
  return said.join(" · ");
}

const SENTENCE_END = /[.!?…。！？]["')\]]{0,4}\s|\n\n/g;
const MARKS = /!?\[([^\]]{0,200})\]\([^)\s]{0,2000}\)|[*`~#>]+/g;

/** Speaks each sentence once it is whole, not each token. */
class Sentences {
  /** `said`: characters that nobody needs to hear again. */
  constructor(said) {
    this.said = said;
    this.looked = said;
  }

  feed(text) {
    SENTENCE_END.lastIndex = Math.max(this.said, this.looked - 8);
    let end = 0;
    while (SENTENCE_END.test(text)) end = SENTENCE_END.lastIndex;
    this.looked = text.length;
    if (end) this.speak(text, end);
  }

  finish(text) {
    this.speak(text, text.length);
  }

  speak(text, end) {
    const part = text.slice(this.said, end);
    this.said = end;
    const plain = part.replace(MARKS, "$1").replaceAll("|", " ").replace(/\s+/g, " ").trim();
    if (plain) announce(plain);
  }
}

/** Whether a key press in a text field means "send": Enter, but not while an input method composes a word. */
export function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

/** Make a text field as high as its text. */
export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

/** Keeps the end in view while a reply grows, until the reader scrolls away. */
export class Follow {
  constructor() {
    this.pane = byId("scroll");
    this.button = byId("to-end");
    this.atEnd = true;
    this.pane.addEventListener("scroll", () => {
      const { scrollTop, scrollHeight, clientHeight } = this.pane;
      this.atEnd = scrollHeight - scrollTop - clientHeight < 48;
      this.button.hidden = this.atEnd;
    }, { passive: true });
    this.button.addEventListener("click", () => this.toEnd());
  }

  grown() {
    if (this.atEnd) this.pane.scrollTop = this.pane.scrollHeight;
  }

  toEnd() {
    this.atEnd = true;
    this.pane.scrollTop = this.pane.scrollHeight;
  }
}
