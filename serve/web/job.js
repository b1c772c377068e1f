// One reply being written, whether or not its conversation is on the screen.

import { ServerError, streamChat } from "./api.js";
import { apiKey } from "./store.js";

/** The numbers among the settings, by the names that the API has for them. */
export const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

export class Job {
  /** `reply`: the message to fill; `changed` is called after each change of it. */
  constructor(chat, reply, changed) {
    this.chat = chat;
    this.reply = reply;
    this.changed = changed;
    this.abort = new AbortController();
  }

  stop() {
    this.abort.abort();
  }

  /** Returns when the reply is finished, stopped or failed; how it ended stands in the reply. */
  async run() {
    const { reply } = this;
    const asked = performance.now();
    let first = null;
    let chunks = 0;
    let usage = null;
    try {
      for await (const event of streamChat(request(this.chat, reply), apiKey(), this.abort.signal)) {
        if (event.usage) usage = event.usage;
        if (event.finish) reply.finish = event.finish;
        if (event.text) reply.content += event.text;
        if (event.reasoning) reply.reasoning = (reply.reasoning ?? "") + event.reasoning;
        if (event.text || event.reasoning) {
          chunks += 1;
          first ??= performance.now();
        }
        reply.stats = stats(usage, chunks, asked, first);
        this.changed();
      }
    } catch (error) {
      if (error.name === "AbortError") reply.finish = "stopped";
      else if (error instanceof ServerError) reply.error = error.plain();
      else throw error;
    }
  }
}

/** The body of the request that a reply answers: all messages before it, those of one role in a row joined. */
export function request(chat, reply) {
  const { settings } = chat;
  const messages = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  for (const message of chat.messages) {
    if (message === reply) break;
    if (!message.content) continue; // a reply that failed before its first token
    const last = messages.at(-1);
    if (last?.role === message.role) last.content += `\n\n${message.content}`;
    else messages.push({ role: message.role, content: message.content });
  }
  const body = { model: settings.model, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of SAMPLING) if (Number.isFinite(settings[name])) body[name] = settings[name];
  return body;
}

/** Tokens as the server counts them or, where it did not come to that, as many as there were chunks. */
function stats(usage, chunks, asked, first) {
  const now = performance.now();
  return {
    exact: usage !== null,
    prompt: usage?.prompt_tokens ?? null,
    cached: usage?.prompt_tokens_details?.cached_tokens ?? 0,
    completion: usage?.completion_tokens ?? chunks,
    first: first === null ? null : (first - asked) / 1000,
    seconds: first === null ? 0 : (now - first) / 1000,
  };
}

const CHARACTERS_A_TOKEN = 4; // of English text; only until the server has counted

/** Tokens that the conversation takes of its context, and whether the server counted them. */
export function contextUse(chat) {
  let tokens = estimate(chat.settings.system ?? "");
  let exact = false;
  for (const { content, stats: counted } of chat.messages) {
    if (counted?.exact) {
      tokens = counted.prompt + counted.completion;
      exact = true;
    } else {
      tokens += counted?.completion ?? estimate(content);
      exact = false;
    }
  }
  return { tokens, exact };
}

function estimate(text) {
  return Math.ceil(text.length / CHARACTERS_A_TOKEN);
}
