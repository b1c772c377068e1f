// What the server says of its models, and what their compression cost.

import { byId, el, number } from "./dom.js";

const percent = (share) => `${(share * 100).toFixed(1)} %`;
const formatOf = (card) => card?.llmlite?.format?.replace(/^.*:/, "").toUpperCase();

/** Every text that an artifact was measured on: `{ protocol, name, perplexity, divergence }`. */
function measuredTexts(card) {
  const found = [];
  for (const [protocol, figures] of Object.entries(card?.llmlite?.evals ?? {})) {
    for (const [name, { perplexity, divergence }] of Object.entries(figures?.texts ?? {})) {
      if (perplexity) found.push({ protocol, name, perplexity, divergence });
    }
  }
  return found;
}

function figures(card) {
  return Object.values(card?.llmlite?.evals ?? {}).find((one) => one?.bytes) ?? {};
}

/** The tokens that prompt and reply may have together; null while the model isn't loaded. */
export const contextOf = (card) => card?.llmlite?.context ?? null;

/** The measured quality in a line, as it stands beside the model's name. */
export function qualityLine(card) {
  if (!card) return "";
  const [text] = measuredTexts(card).sort((a, b) => Boolean(b.divergence) - Boolean(a.divergence));
  const parts = formatOf(card) ? [formatOf(card)] : [];
  if (text?.divergence) parts.push(`agrees with the original on ${percent(text.divergence.same_top)} of tokens`);
  else if (text) parts.push(`perplexity ${number(text.perplexity.value, 2)}`);
  else parts.push(card.llmlite?.loaded === false ? "loads with the first message" : "quality not measured");
  return parts.join(" · ");
}

/** What the figures of the empty page are. */
export function introduction(card) {
  if (!card) return "";
  if (card.llmlite?.loaded === false) return "It is loaded with the first message, which takes a moment.";
  const made = formatOf(card) ? `Compressed to ${formatOf(card)}. ` : "";
  return made + (measuredTexts(card).length ? "What that cost, as measured:" : "What that cost was not measured.");
}

/** Up to four figures for the empty page: `[value, what it is]`. */
export function headlines(card) {
  const [text] = measuredTexts(card).sort((a, b) => Boolean(b.divergence) - Boolean(a.divergence));
  const shown = [];
  if (text?.divergence) {
    shown.push([percent(text.divergence.same_top), "same most likely token as the original"]);
    shown.push([text.divergence.mean_kl.toPrecision(3), "mean divergence from it, in nats"]);
  }
  if (text) shown.push([number(text.perplexity.value, 2), `perplexity on ${text.name}`]);
  if (figures(card).bytes) shown.push([`${number(figures(card).bytes / 1e6)} MB`, "on disk"]);
  else if (contextOf(card)) shown.push([number(contextOf(card)), "tokens of context"]);
  return shown;
}

/** Fill the list of models; returns the chosen one's card. A name that isn't served any more gives way to the first. */
export function fillChoice(select, cards, chosen) {
  select.replaceChildren(...cards.map((card) => {
    const base = card.llmlite?.adapter_of;
    return el("option", { value: card.id, text: base ? `${card.id} (adapter of ${base})` : card.id });
  }));
  const card = cards.find(({ id }) => id === chosen) ?? cards[0];
  if (card) select.value = card.id;
  select.hidden = !card;
  return card;
}

/** The dialog with all that is known. */
export function showFacts(card) {
  const about = card.llmlite ?? {};
  const size = figures(card);
  const rows = [
    ["Format", about.format],
    ["Original", about.base?.source],
    ["Adapter of", about.adapter_of],
    ["Size", size.bytes && `${number(size.bytes / 1e6, 1)} MB, ${number(size.bits_per_weight, 2)} bits per weight`],
    ["Context", about.context && `${number(about.context)} tokens`],
    ["Runs on", about.engine && `${about.engine.name} (${about.engine.version})`],
  ].filter(([, value]) => value);
  byId("facts-name").textContent = card.id;
  byId("facts-body").replaceChildren(factList(rows), ...measured(card));
  byId("facts").showModal();
}

function measured(card) {
  const texts = measuredTexts(card);
  if (!texts.length) {
    const what = card.llmlite?.loaded === false ? "What is known of this model is read when it is loaded, with the "
      + "first message." : "Nobody measured what the compression of this model cost. llmlite eval does, and this page "
      + "then shows it.";
    return [el("p", { class: "muted", text: what })];
  }
  return texts.flatMap(({ protocol, name, perplexity, divergence }) => [
    el("h3", { text: `Measured on ${name}` }),
    factList([
      ["Perplexity", `${number(perplexity.value, 3)} ± ${number(perplexity.stderr, 3)}`],
      ...(divergence ? [
        ["Of the original", divergence.base_perplexity && number(divergence.base_perplexity, 3)],
        ["Same most likely token", percent(divergence.same_top)],
        ["Mean divergence", `${divergence.mean_kl.toPrecision(3)} nats`],
        ["99th percentile", `${divergence.p99_kl.toPrecision(3)} nats`],
      ] : []),
      ["Protocol", `${protocol}, ${number(perplexity.tokens)} tokens`],
    ].filter(([, value]) => value)),
  ]);
}

function factList(rows) {
  return el("dl", { class: "facts" }, ...rows.flatMap(([name, value]) => [el("dt", { text: name }),
    el("dd", { text: String(value) })]));
}
