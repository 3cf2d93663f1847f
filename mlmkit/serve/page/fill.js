// The tab that fills masks.

import { ask } from "./api.js";
import { duration, element, find, percent, plural, say } from "./dom.js";
import { moveFocusWith, shownToken, submitWithEnter } from "./dom.js";
import { countMasks, excerpt, fillMask } from "./text.js";

const box = find("fill-text");
const results = find("fill-results");
const status = find("fill-status");
const earlier = []; // the text before each fill, for Undo
let mask = "";
let replacing = false;

/** Sets up the tab. `scoreText` shows a text without masks in the other tab. */
export function startFill(info, scoreText) {
  mask = info.mask_token;
  find("mask-token").textContent = mask;
  find("insert-mask").disabled = find("fill-button").disabled = false;
  for (const option of find("top-k").options) option.disabled = Number(option.value) > info.top_k;
  find("score-it").onclick = () => scoreText(box.value);
  box.placeholder = `Write a text with ${mask} where a word is missing.`;
  box.value ||= info.example;
}

/** Shows the tab with a new text and asks at once. `make` gets the mask token and returns the text. */
export function fillText(make) {
  if (!mask) return;
  earlier.length = 0;
  replace(0, box.value.length, make(mask));
  refresh();
}

find("fill-form").addEventListener("submit", (event) => {
  event.preventDefault();
  refresh();
});
find("insert-mask").addEventListener("click", insertMask);
find("top-k").addEventListener("change", () => results.childElementCount && refresh());
find("undo").addEventListener("click", async () => {
  replace(0, box.value.length, earlier.pop());
  await refresh();
  focusCandidate(0);
});
submitWithEnter(box);
box.addEventListener("keydown", (event) => {
  // Compare the key's code too: on a Mac, Alt+M types another character.
  const isM = event.code === "KeyM" || event.key.toLowerCase() === "m";
  if (!isM || !event.altKey || event.ctrlKey || event.metaKey || !mask) return;
  event.preventDefault();
  insertMask();
});
box.addEventListener("input", () => {
  if (replacing) return;
  find("filled").hidden = true;
  earlier.length = 0;
  find("undo").hidden = true;
  outdate();
});
/** Replaces the selection, except white space at its edges: a double click also selects the space after a word. */
function insertMask() {
  const { selectionStart, selectionEnd, value } = box;
  const selected = value.slice(selectionStart, selectionEnd);
  const [, lead, trail] = /^(\s*).*?(\s*)$/s.exec(selected);
  replace(selectionStart, selectionEnd, lead + mask + (selected.trim() ? trail : ""));
  box.focus();
  outdate();
}

/** Edits the text so that the browser's own undo knows of it, if the browser allows that. */
function replace(start, end, text) {
  replacing = true;
  box.focus();
  box.setSelectionRange(start, end);
  if (!text || !document.execCommand("insertText", false, text)) box.setRangeText(text, start, end, "end");
  replacing = false;
}

/** Lets the candidates of an older text be read, but not used. */
function outdate() {
  if (!results.childElementCount || results.inert) return;
  results.inert = true;
  say(status, "The text has changed since.");
}

async function refresh() {
  if (!mask) return;
  const text = box.value;
  const topK = Number(find("top-k").value);
  const answer = await ask("fill-mask", { inputs: text, parameters: { top_k: topK } }, status);
  if (!answer) {
    results.inert = true;
    return;
  }
  const masks = Array.isArray(answer.data[0]) ? answer.data : [answer.data];
  find("filled").hidden = true;
  results.replaceChildren(...masks.map((candidates, index) => showMask(text, candidates, index, masks)), note(masks));
  results.inert = box.value !== text;
  find("undo").hidden = !earlier.length;
  say(status, `${plural(masks.length, "mask")} in ${duration(answer.milliseconds)}`);
}

const best = (masks) => Math.max(...masks.map((candidates) => candidates[0].score));

function showMask(text, candidates, index, masks) {
  const parts = excerpt(text, mask, index).map((part) => showPart(part, index, masks.length > 1));
  const context = element("p", { class: "context", dir: "auto" }, ...parts);
  const heading = element("h2", {}, masks.length > 1 ? `Mask ${index + 1}` : "Mask");
  const isWhole = (candidate) => !candidate.token_str.includes("\ufffd"); // otherwise only some bytes of a character
  const first = candidates.find(isWhole);
  const rows = candidates.map((candidate) => {
    const button = element(
      "button",
      {
        type: "button",
        class: "candidate",
        tabindex: candidate === first ? "0" : "-1",
        title: `token ${candidate.token}, probability ${candidate.score.toPrecision(4)}`,
      },
      shownToken(candidate.token_str),
      showBar(candidate.score / best(masks)),
      element("span", { class: "probability" }, percent(candidate.score)),
    );
    button.addEventListener("click", () => use(index, candidates, candidate));
    button.disabled = !isWhole(candidate);
    return element("li", {}, button);
  });
  const rest = Math.max(0, 1 - candidates.reduce((sum, { score }) => sum + score, 0));
  rows.push(element("li", { class: "rest" }, element("span", {}, "all other tokens"), percent(rest)));
  const list = element("ol", {}, ...rows);
  moveFocusWith("ArrowUp", "ArrowDown", list, ".candidate:enabled");
  return element("section", { class: "mask" }, heading, context, list);
}

function showPart(part, index, several) {
  if (typeof part === "string") return part;
  const label = several ? `mask ${part + 1}` : "the mask";
  const classes = part === index ? "blank" : "blank other";
  return element("span", { class: classes, role: "img", "aria-label": label }, several ? String(part + 1) : "\u00a0");
}

function showBar(share) {
  const bar = element("span", { class: "bar" });
  bar.style.width = `${100 * share}%`;
  return element("span", { class: "track" }, bar);
}

function note(masks) {
  const alone = "Each mask is filled on its own, with the others still masked, so the best candidates may not go together. ";
  const scale = "All bars share one scale. ";
  const keys = element("span", { class: "keys" }, "↑ ↓ choose, Enter fills.");
  return element("p", { class: "note" }, masks.length > 1 ? alone + scale : "", keys);
}

async function use(index, candidates, candidate) {
  const before = box.value;
  const { start, end, filled } = fillMask(before, mask, index, candidates, candidate);
  earlier.push(before);
  replace(start, end, filled);
  find("undo").hidden = false;
  if (countMasks(box.value, mask)) {
    await refresh();
    focusCandidate(index);
    return;
  }
  results.replaceChildren();
  say(status, "Every mask is filled.");
  find("filled").hidden = false;
  find("undo").focus();
}

/** Moves the focus to the next mask, so that Enter, Enter, Enter fills all. */
function focusCandidate(index) {
  const sections = results.querySelectorAll(".mask");
  sections[Math.min(index, sections.length - 1)]?.querySelector(".candidate:enabled")?.focus();
}
