// The server's API: models, and a chat as a stream of events.

/** What went wrong, in the server's own words: its OpenAI error object, or what stands in for one. */
export class ServerError extends Error {
  constructor(status, { message, code = null, param = null }) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }

  /** As it is kept with a message. */
  plain() {
    return { status: this.status, message: this.message, code: this.code, param: this.param };
  }
}

/** GET v1/models: the model objects. */
export async function listModels(key) {
  const answer = await ask("v1/models", { headers: authorization(key) });
  return (await answer.json()).data;
}

/**
 * POST v1/chat/completions, streamed: yields `{ text, finish, usage }`, each undefined where a chunk has none.
 * Raises `ServerError`; AbortError when `signal` says stop.
 */
export async function* streamChat(body, key, signal) {
  const answer = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorization(key) },
    body: JSON.stringify(body),
    signal,
  });
  let complete = false;
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") {
      complete = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(answer.status, chunk.error);
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content || undefined;
    yield { text, reasoning: choice?.delta?.reasoning_content || undefined,
      finish: choice?.finish_reason ?? undefined, usage: chunk.usage ?? undefined };
  }
  if (!complete) throw new ServerError(0, { message: "The connection ended before the reply was complete." });
}

function authorization(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, { message: "The server can't be reached. Is it running?" });
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  throw new ServerError(answer.status, errorObject(text) ?? {
    message: text.slice(0, 500) || `The server answered ${answer.status} ${answer.statusText}`.trim(),
  });
}

function errorObject(text) {
  try {
    const { error } = JSON.parse(text);
    return typeof error?.message === "string" ? error : null;
  } catch {
    return null;
  }
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let chunk;
      try {
        chunk = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        return; // cut off: there was no [DONE], which the caller tells
      }
      if (chunk.done) return;
      const lines = (rest + chunk.value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trimStart();
    }
  } finally {
    reader.cancel().catch(() => {}); // the server may stop now; that the stream is broken already is no news
  }
}
