// The page: which conversation is shown, what is being written, what each control does.

import { listModels, ServerError } from "./api.js";
import { byId, el, icon, iconButton, number } from "./dom.js";
import { contextUse, Job } from "./job.js";
import { errorBox, fit, Follow, messageView, sends } from "./messages.js";
import { contextOf, fillChoice, headlines, introduction, qualityLine, showFacts } from "./models.js";
import { askForKey, Drawer, notice, SettingsForm, themeSwitch } from "./panel.js";
import * as store from "./store.js";

const SAVED_EVERY = 2000; // milliseconds, while a reply is written
const TITLE_LENGTH = 60;

const jobs = new Map(); // by the conversation's id
const views = new Map(); // by message, of the conversation that is shown
let chat = store.newChat();
let cards = null; // until the server has said which

const input = byId("input");
const follow = new Follow();
const chatsDrawer = new Drawer(byId("chats"), byId("chats-toggle"), "(max-width: 52rem)", true);
const settingsDrawer = new Drawer(byId("settings"), byId("settings-toggle"), "(max-width: 72rem)", false);
const form = new SettingsForm(() => {
  keep();
  showMeter();
});
const actions = { edit, regenerate, grown };

const card = () => cards?.find(({ id }) => id === chat.settings.model);
const job = () => jobs.get(chat.id);

// Models

async function loadModels() {
  try {
    cards = await listModels(store.apiKey());
    byId("trouble").replaceChildren();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    cards ??= [];
    if (error.status === 401 && (await askForKey(store.apiKey() ? error.message : null))) return loadModels();
    byId("trouble").replaceChildren(errorBox(error.plain()),
      el("button", { type: "button", class: "button", text: "Try again", on: { click: loadModels } }));
  }
  showModel();
}

function showModel() {
  const chosen = fillChoice(byId("model"), cards ?? [], chat.settings.model);
  if (chosen) chat.settings.model = chosen.id;
  byId("quality").textContent = qualityLine(chosen);
  byId("quality").hidden = !chosen;
  byId("welcome-name").textContent = chosen?.id ?? (cards ? "llmlite" : "");
  byId("welcome-about").textContent = introduction(chosen);
  document.body.classList.toggle("has-choice", Boolean(cards && cards.length > 1));
  byId("welcome-facts").replaceChildren(...headlines(chosen).map(([value, what]) =>
    el("div", {}, el("dt", { text: what }), el("dd", { text: value }))));
  showMeter();
}

// Conversations

function show(next) {
  chat = next;
  form.show(chat.settings);
  views.clear();
  const list = byId("messages");
  list.replaceChildren(...chat.messages.map(viewOf));
  if (job()) views.get(job().reply)?.begin();
  document.title = chat.title ? `${chat.title} – llmlite` : "llmlite";
  byId("title").textContent = chat.title || "New chat";
  notice("");
  showModel();
  showState();
  showChats();
  follow.toEnd();
}

function viewOf(message) {
  const view = messageView(message, actions);
  views.set(message, view);
  return view.root;
}

function showChats() {
  const entries = store.listChats();
  byId("chat-list").replaceChildren(...entries.map(({ id, title }) => {
    const current = id === chat.id;
    const open = el("button", { type: "button", class: "open", "aria-current": current ? "true" : null, title,
      on: { click: () => {
        chatsDrawer.yield();
        if (!current) show(jobs.get(id)?.chat ?? store.loadChat(id) ?? store.newChat());
        input.focus();
      } } }, el("span", { text: title }));
    if (jobs.has(id)) open.append(el("span", { class: "dot", role: "img", "aria-label": "being written" }));
    return el("li", {}, open, iconButton("export", `Export ${title}`, () => exportChat(id)),
      iconButton("delete", `Delete ${title}`, () => remove(id)));
  }));
  byId("no-chats").hidden = entries.length > 0;
}

function keep(written = chat) {
  if (written.messages.length === 0) return store.keepSettings(written.settings);
  written.updated = Date.now();
  const kept = store.saveChat(written);
  store.keepSettings(written.settings);
  if (!kept) notice("This browser has no room left for conversations: what is new here is lost when the page closes. "
    + "Export what you need and delete old ones.");
}

function remove(id) {
  const gone = jobs.get(id)?.chat ?? store.loadChat(id);
  jobs.get(id)?.stop();
  jobs.delete(id);
  store.deleteChat(id);
  if (id === chat.id) show(store.newChat());
  else showChats();
  byId("new-chat").focus();
  if (!gone) return;
  notice(`“${gone.title}” was deleted.`, "Undo", () => {
    keep(gone);
    show(gone);
  });
}

function exportChat(id) {
  const kept = jobs.get(id)?.chat ?? store.loadChat(id);
  const url = URL.createObjectURL(new Blob([JSON.stringify(kept, null, 2)], { type: "application/json" }));
  const name = kept.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40);
  el("a", { href: url, download: `${name || "chat"}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// Sending

function send() {
  const text = input.value.trim();
  if (!text || job() || !form.valid(settingsDrawer)) return;
  input.value = "";
  fit(input);
  add(text);
}

function add(text) {
  const message = { role: "user", content: text };
  chat.title ||= text.replace(/\s+/g, " ").slice(0, TITLE_LENGTH);
  chat.messages.push(message);
  byId("messages").append(viewOf(message));
  document.title = `${chat.title} – llmlite`;
  byId("title").textContent = chat.title;
  notice("");
  reply();
}

/** Have the model answer what the conversation ends with. */
async function reply() {
  const written = chat;
  const message = { role: "assistant", content: "", model: written.settings.model };
  written.messages.push(message);
  byId("messages").append(viewOf(message));
  let saved = Date.now();
  const running = new Job(written, message, () => {
    if (written === chat) views.get(message)?.update();
    if (Date.now() - saved > SAVED_EVERY) {
      saved = Date.now();
      keep(written);
    }
  });
  jobs.set(written.id, running);
  views.get(message).begin();
  keep(written);
  showChats();
  showState();
  follow.toEnd();
  await running.run();
  if (jobs.get(written.id) !== running) return; // deleted or undone meanwhile
  jobs.delete(written.id);
  finished(written, message);
}

async function finished(written, message) {
  keep(written);
  showChats();
  if (written === chat) {
    views.get(message)?.finish();
    showState();
    showMeter();
    follow.grown();
  }
  if (message.error?.status === 401 && written === chat) {
    if (await askForKey(store.apiKey() ? message.error.message : null)) {
      await loadModels();
      if (written === chat && written.messages.at(-1) === message && !job()) regenerate(message);
    }
  } else if (card()?.llmlite?.loaded === false) await loadModels(); // its facts are known now
}

function edit(message, text) {
  if (job()) return notice("A reply is being written. Stop it first, then send.");
  if (!form.valid(settingsDrawer)) return;
  cut(message, "Your message and what followed it were replaced.");
  add(text);
  offerUndo();
  input.focus();
}

function regenerate(message) {
  if (job() || !form.valid(settingsDrawer)) return;
  const undone = !message.error && message.content;
  cut(message, undone ? "The reply and what followed it were replaced." : null);
  reply();
  offerUndo();
  input.focus();
}

let before = null; // what the last cut took away

function cut(message, said) {
  before = said ? { id: chat.id, messages: [...chat.messages], said } : null;
  const at = chat.messages.indexOf(message);
  for (const gone of chat.messages.splice(at)) {
    views.get(gone)?.root.remove();
    views.delete(gone);
  }
}

function offerUndo() {
  if (!before) return;
  const { id, messages, said } = before;
  notice(said, "Undo", () => {
    if (chat.id !== id) return;
    const running = job();
    running?.stop();
    jobs.delete(id);
    chat = { ...chat, messages };
    keep();
    show(chat);
  });
}

/** Once a frame while a reply is written. */
function grown() {
  follow.grown();
  showMeter();
}

function stop() {
  job()?.stop();
  input.focus();
}

// What is shown beside the messages

function showState() {
  const busy = Boolean(job());
  document.body.classList.toggle("is-busy", busy);
  byId("messages").setAttribute("aria-busy", String(busy));
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("welcome").hidden = chat.messages.length > 0;
}

function showMeter() {
  const context = contextOf(card());
  const { tokens, exact } = contextUse(chat);
  const meter = byId("meter");
  const share = context ? Math.min(1, tokens / context) : 0;
  meter.hidden = !context;
  meter.setAttribute("aria-valuemax", context ?? 0);
  meter.setAttribute("aria-valuenow", Math.min(tokens, context ?? 0));
  meter.dataset.level = share > 0.95 ? "full" : share > 0.8 ? "high" : "low";
  meter.firstElementChild.style.width = `${share * 100}%`;
  const used = `${exact || !tokens ? "" : "about "}${number(tokens)}`;
  byId("meter-text").textContent = context ? `Context: ${used} of ${number(context)} tokens` : "";
}

// Wiring

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
input.addEventListener("input", () => fit(input));
input.addEventListener("keydown", (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && job() && !document.querySelector("dialog[open]")) stop();
});
byId("stop").append(icon("stop"));
byId("stop").addEventListener("click", stop);
byId("new-chat").addEventListener("click", () => {
  chatsDrawer.yield();
  show(store.newChat());
  input.focus();
});
byId("model").addEventListener("change", (event) => {
  chat.settings.model = event.target.value;
  keep();
  showModel();
});
byId("quality").addEventListener("click", () => card() && showFacts(card()));
byId("key-change").addEventListener("click", async () => {
  if (await askForKey(null)) await loadModels();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("key").close("use");
});
for (const close of document.querySelectorAll("dialog .close")) {
  close.addEventListener("click", () => close.closest("dialog").close());
}
addEventListener("storage", (event) => {
  const id = store.changedChat(event);
  if (id === chat.id && !job()) {
    const other = store.loadChat(id); // this conversation went on in another tab
    if (other) show(other);
  } else if (id) showChats();
});
addEventListener("pagehide", () => {
  for (const running of jobs.values()) keep(running.chat);
});
themeSwitch(byId("theme"));
if (store.forgetful) notice("This browser keeps nothing for this page: conversations are lost when it closes.");
show(chat);
input.focus();
loadModels();
