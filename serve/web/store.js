// Conversations, in this browser alone: each under a key of its own, with its title beside it, so that two tabs
// don't overwrite each other's. The API key is kept for as long as the tab is open.

const CHAT = "llmlite.chat.";
const TITLE = "llmlite.title.";
const SETTINGS = "llmlite.settings";
const KEY = "llmlite.key";

const memory = new Map();
const inMemory = {
  getItem: (name) => memory.get(name) ?? null,
  setItem: (name, value) => memory.set(name, value),
  removeItem: (name) => memory.delete(name),
  keys: () => [...memory.keys()],
};

function open(name) {
  try {
    const storage = window[name];
    storage.getItem("llmlite");
    return {
      getItem: (key) => storage.getItem(key),
      setItem: (key, value) => storage.setItem(key, value),
      removeItem: (key) => storage.removeItem(key),
      keys: () => Object.keys(storage),
    };
  } catch {
    return inMemory;
  }
}

const local = open("localStorage");
const session = open("sessionStorage");

/** Whether a closed tab loses everything: the browser keeps nothing for this page. */
export const forgetful = local === inMemory;

/** An empty conversation with the settings that were used last. */
export function newChat() {
  return { id: crypto.getRandomValues(new Uint32Array(3)).join("-"), title: "", created: Date.now(),
    updated: Date.now(), settings: lastSettings(), messages: [] };
}

/** `{ id, title, updated }` of all that are kept, the latest first. */
export function listChats() {
  return local.keys().filter((key) => key.startsWith(TITLE))
    .map((key) => ({ id: key.slice(TITLE.length), ...parsed(local.getItem(key)) }))
    .filter((entry) => typeof entry.title === "string")
    .sort((a, b) => b.updated - a.updated);
}

/** A kept conversation; null where there is none that can be read. */
export function loadChat(id) {
  const chat = parsed(local.getItem(CHAT + id));
  return Array.isArray(chat?.messages) && chat.settings ? chat : null;
}

/** False where the browser has no room left for it. */
export function saveChat(chat) {
  try {
    local.setItem(CHAT + chat.id, JSON.stringify(chat));
    local.setItem(TITLE + chat.id, JSON.stringify({ title: chat.title, updated: chat.updated }));
    return true;
  } catch (error) {
    if (error.name === "QuotaExceededError" || error.name === "NS_ERROR_DOM_QUOTA_REACHED") return false;
    throw error;
  }
}

export function deleteChat(id) {
  local.removeItem(CHAT + id);
  local.removeItem(TITLE + id);
}

/** The conversation that another tab's change is about; null for other changes. */
export function changedChat(event) {
  return event.key?.startsWith(CHAT) ? event.key.slice(CHAT.length) : null;
}

export function lastSettings() {
  return parsed(local.getItem(SETTINGS)) ?? {};
}

export function keepSettings(settings) {
  try {
    local.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // No room: the conversation's own copy is what counts, and its saving tells the user.
  }
}

export const apiKey = () => session.getItem(KEY) ?? "";

export function keepApiKey(key) {
  if (key) session.setItem(KEY, key);
  else session.removeItem(KEY);
}

/** "dark", "light" or null for the system's. */
export function keepTheme(theme) {
  try {
    if (theme) local.setItem("llmlite.theme", theme);
    else local.removeItem("llmlite.theme");
  } catch {
    // No room: it holds until the page is closed.
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
