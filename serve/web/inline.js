// Within a paragraph: code, bold, italic, struck out, links.

import { el } from "./dom.js";

const DEEPEST = 6; // emphasis and links within each other
const SPECIAL = /[\\`*_~[!h<]/g;
const LINK = /!?\[([^[\]\n]{0,500})\]\(<?([^\s()<>]{1,2000}(?:\([^\s()<>]{0,500}\)[^\s()<>]{0,500}){0,4})>?(?:[ \t]"[^"\n]{0,200}")?\)/y;
const BARE = /https?:\/\/[^\s<>"'`]{1,2000}/y;
const EMPHASIS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };
const WORD = /[\p{L}\p{N}_]/u;
const ESCAPED = /[!-/:-@[-`{-~]/;

/** Append the nodes of `text` to `into`. */
export function inline(text, into, depth = 0) {
  const seen = new Map(); // by delimiter: from where on it is known that nothing closes it
  let plain = 0;
  let at = 0;
  const flush = (end) => appendText(into, text.slice(plain, end));
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const special = SPECIAL.exec(text);
    if (!special) break;
    at = special.index;
    if (text[at] === "\\") {
      if (ESCAPED.test(text[at + 1] ?? "")) {
        flush(at);
        plain = at + 1;
        at += 2;
      } else at += 1;
      continue;
    }
    const found = depth < DEEPEST ? span(text, at, seen, depth) : null;
    if (!found) {
      at = skip(text, at);
      continue;
    }
    flush(at);
    into.append(found.node);
    at = plain = found.end;
  }
  flush(text.length);
}

/** What stands at a special character: its node and where it ends; null where it is no more than that character. */
function span(text, at, seen, depth) {
  switch (text[at]) {
    case "`":
      return code(text, at, seen);
    case "[":
    case "!":
    case "<":
      return link(text, at, depth);
    case "h":
      return bareLink(text, at);
    default:
      return emphasis(text, at, seen, depth);
  }
}

/** Past a run of equal delimiters, which are all text where the first is. */
function skip(text, at) {
  const mark = text[at];
  let end = at + 1;
  if ("`*_~".includes(mark)) while (text[end] === mark) end += 1;
  return end;
}

function code(text, at, seen) {
  const ticks = text.slice(at, skip(text, at));
  if (seen.has(ticks)) return null;
  let end = at + ticks.length;
  while ((end = text.indexOf(ticks, end)) !== -1) {
    if (text[end - 1] !== "`" && text[end + ticks.length] !== "`") {
      let inner = text.slice(at + ticks.length, end).replaceAll("\n", " ");
      if (inner.startsWith(" ") && inner.endsWith(" ") && inner.trim() !== "") inner = inner.slice(1, -1);
      return { node: el("code", { text: inner }), end: end + ticks.length };
    }
    end = skip(text, end);
  }
  seen.set(ticks, at);
  return null;
}

function emphasis(text, at, seen, depth) {
  const run = skip(text, at) - at;
  const mark = text[at].repeat(text[at] === "~" ? 2 : Math.min(2, run));
  if (run > 3 || (text[at] === "~" && run !== 2)) return null;
  if (seen.has(mark) || /\s/.test(text[at + mark.length] ?? " ")) return null;
  if (text[at] === "_" && WORD.test(text[at - 1] ?? " ")) return null;
  let end = at + mark.length + 1;
  while ((end = text.indexOf(mark, end)) !== -1) {
    const length = skip(text, end) - end;
    const inside = /\s/.test(text[end - 1]) || (text[at] === "_" && WORD.test(text[end + length] ?? " "));
    if (!inside && (length === mark.length || length === 3)) {
      end += length - mark.length; // of three, the inner ones close what stands within
      const node = el(EMPHASIS[mark]);
      inline(text.slice(at + mark.length, end), node, depth + 1);
      return { node, end: end + mark.length };
    }
    end += length;
  }
  seen.set(mark, at);
  return null;
}

/** [text](target), and ![text](target), which is shown as a link: a reply never makes the browser fetch anything. */
function link(text, at, depth) {
  if (text[at] === "<") {
    const bare = bareLink(text, at + 1);
    return bare && text[bare.end] === ">" ? { node: bare.node, end: bare.end + 1 } : null;
  }
  LINK.lastIndex = at;
  const found = LINK.exec(text);
  const target = found && safe(found[2]);
  if (!target) return null;
  const node = anchor(target);
  if (found[1].trim() === "") appendText(node, found[2]);
  else inline(found[1], node, depth + 1);
  return { node, end: LINK.lastIndex };
}

function bareLink(text, at) {
  if (at > 0 && WORD.test(text[at - 1])) return null;
  BARE.lastIndex = at;
  const found = BARE.exec(text);
  if (!found) return null;
  let shown = found[0].replace(/[.,;:!?*_~\]]{1,50}$/, "");
  if (shown.endsWith(")") && !shown.includes("(")) shown = shown.slice(0, -1);
  const target = safe(shown);
  if (!target) return null;
  const node = anchor(target);
  node.textContent = shown;
  return { node, end: at + shown.length };
}

function anchor(target) {
  return el("a", { href: target, title: target, target: "_blank", rel: "noopener noreferrer nofollow" });
}

/** The address, if it is one of the web or of mail; null for javascript:, data: and all others. */
function safe(target) {
  try {
    const url = new URL(target);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function appendText(into, text) {
  text.split("\n").forEach((line, n) => {
    if (n) into.append(el("br"));
    if (line) into.append(line);
  });
}
