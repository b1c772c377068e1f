// Markdown of a model's reply into DOM nodes. Every character ends in a text node or, where it is a link's target,
// in an attribute after its scheme was checked. Work grows linearly with the text, whatever the model writes.

import { copyButton, el } from "./dom.js";
import { inline } from "./inline.js";

const DEEPEST = 8; // lists and quotes within each other; deeper ones stay text
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:[ \t]+(.*)|)$/;

/** Nodes of a whole text. */
export function render(text) {
  const out = document.createDocumentFragment();
  out.append(...blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0));
  return out;
}

/** Shows a text that grows: what can't change any more is rendered once, the rest again with each write. */
export class Growing {
  constructor(root) {
    this.root = root;
    this.done = 0;
    this.tail = [];
    this.unsettled = 0; // characters
  }

  /** `text`: all of it so far. */
  write(text) {
    for (const node of this.tail) node.remove();
    const settled = this.done + settledLength(text.slice(this.done));
    if (settled > this.done) {
      this.root.append(render(text.slice(this.done, settled)));
      this.done = settled;
    }
    this.unsettled = text.length - settled;
    const rest = render(text.slice(settled));
    this.tail = [...rest.childNodes];
    this.root.append(rest);
  }
}

/** How many characters form blocks that nothing which follows can change. */
function settledLength(text) {
  let settled = 0;
  let at = 0;
  let fence = null;
  let blank = false;
  for (const line of text.split("\n")) {
    const opening = FENCE.exec(line);
    if (fence) {
      if (closes(line, fence)) fence = null;
    } else {
      if (blank && /^\S/.test(line) && !ITEM.test(line)) settled = at;
      if (opening) fence = opening[1];
    }
    blank = !fence && line.trim() === "";
    at += line.length + 1;
  }
  return settled;
}

function closes(line, fence) {
  const mark = line.trim();
  return mark.length >= fence.length && mark === fence[0].repeat(mark.length);
}

function blocks(lines, depth) {
  const out = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [node, next] = block(lines, at, depth);
    out.push(node);
    at = next;
  }
  return out;
}

/** The block that begins at a line, and the line after it. */
function block(lines, at, depth) {
  const line = lines[at];
  let found;
  if ((found = FENCE.exec(line))) return codeBlock(lines, at, found);
  if ((found = HEADING.exec(line))) {
    const heading = el(`h${Math.min(6, found[1].length + 2)}`);
    inline(found[2].trimEnd().replace(/\s#+$/, ""), heading);
    return [heading, at + 1];
  }
  if (RULE.test(line)) return [el("hr"), at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  if (line.includes("|") && at + 1 < lines.length) {
    const made = table(lines, at);
    if (made) return made;
  }
  return paragraph(lines, at);
}

function codeBlock(lines, at, [opening, fence, info]) {
  const indent = opening.length - opening.trimStart().length;
  let end = at + 1;
  while (end < lines.length && !closes(lines[end], fence)) end += 1;
  const body = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, leading(line))));
  const code = body.join("\n");
  const language = info.trim().split(/\s/, 1)[0].slice(0, 30);
  const head = el("div", { class: "code-head" }, el("span", { text: language || "text" }),
    copyButton("Copy code", () => code));
  const pre = el("pre", { tabindex: 0, role: "group", "aria-label": `Code${language ? `, ${language}` : ""}` },
    el("code", { text: code }));
  return [el("div", { class: "code" }, head, pre), end + 1];
}

function quote(lines, at, depth) {
  const body = [];
  let end = at;
  for (; end < lines.length && lines[end].trim() !== ""; end += 1) {
    if (!QUOTE.test(lines[end]) && starts(lines[end])) break;
    body.push(lines[end].replace(QUOTE, ""));
  }
  return [el("blockquote", {}, ...blocks(body, depth + 1)), end];
}

function list(lines, at, depth) {
  const ordered = /\d/.test(ITEM.exec(lines[at])[2]);
  const kind = (found) => found[2].at(-1);
  const mark = kind(ITEM.exec(lines[at]));
  const made = el(ordered ? "ol" : "ul");
  const first = Number.parseInt(ITEM.exec(lines[at])[2], 10);
  if (ordered && first !== 1) made.setAttribute("start", first);
  let found;
  while (at < lines.length && (found = ITEM.exec(lines[at])) && kind(found) === mark && !RULE.test(lines[at])) {
    const body = [found[3] ?? ""];
    const own = Math.min(4, lines[at].length - body[0].length) || 2;
    at = itemLines(lines, at + 1, Math.max(2, own), body);
    const loose = body.some((line, n) => line.trim() === "" && n < body.length - 1);
    made.append(item(body, loose, depth));
    while (at < lines.length && lines[at].trim() === "" && ITEM.test(lines[at + 1] ?? "")) at += 1;
  }
  return [made, at];
}

/** Puts the lines that belong to an item into `body`, without their indent; returns the line after them. */
function itemLines(lines, at, indent, body) {
  for (; at < lines.length; at += 1) {
    const line = lines[at];
    const inner = leading(line);
    if (line.trim() === "") {
      if (leading(lines[at + 1] ?? "") < 2) break;
      body.push("");
    } else if (inner >= 2) body.push(line.slice(Math.min(inner, indent)));
    else if (starts(line)) break;
    else body.push(line);
  }
  return at;
}

function item(body, loose, depth) {
  const made = el("li");
  for (const node of blocks(body, depth + 1)) {
    if (node.nodeName === "P" && !loose) made.append(...node.childNodes);
    else made.append(node);
  }
  return made;
}

function table(lines, at) {
  const head = cells(lines[at]);
  const marks = cells(lines[at + 1]);
  if (marks.length !== head.length || !marks.every((mark) => /^:?-+:?$/.test(mark))) return null;
  const sides = marks.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : "left"));
  const row = (tag, texts) =>
    el("tr", {}, ...sides.map((side, n) => {
      const cell = el(tag, { class: `to-${side}`, scope: tag === "th" ? "col" : null });
      inline(texts[n] ?? "", cell);
      return cell;
    }));
  const body = el("tbody");
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|"); end += 1) body.append(row("td", cells(lines[end])));
  const made = el("table", {}, el("thead", {}, row("th", head)), body);
  return [el("div", { class: "table", tabindex: 0, role: "group", "aria-label": "Table" }, made), end];
}

function cells(line) {
  const bare = line.trim().replace(/^\|/, "").replace(/([^\\]|^)\|$/, "$1");
  return bare.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at) {
  const made = el("p");
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !starts(lines[end])) end += 1;
  inline(lines.slice(at, end).map((line) => line.trim()).join("\n"), made);
  return [made, end];
}

/** Whether a line begins a block even without a blank line before it. */
function starts(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

function leading(line) {
  return line.length - line.trimStart().length;
}
